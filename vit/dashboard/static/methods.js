// Written by `python -m vit.map_methods`.

export const MAP_METHODS = {
  "relevance": {
    "title": "Relevance",
    "hint": "attention and its gradients through all layers, for one class",
    "byClass": true,
    "sentence": "through {all}"
  },
  "rollout": {
    "title": "Rollout",
    "hint": "attention followed through the layers, whatever the class",
    "byClass": false,
    "sentence": ""
  },
  "raw": {
    "title": "Raw attention",
    "hint": "attention of one layer",
    "byClass": false,
    "sentence": ""
  },
  "gradient_rollout": {
    "title": "Gradient rollout",
    "hint": "rollout weighted by gradients, for one class",
    "byClass": true,
    "sentence": "along the attention paths through {all} that raise its score"
  },
  "legrad": {
    "title": "LeGrad",
    "hint": "gradients of the attention, layer by layer, for one class",
    "byClass": true,
    "sentence": "judged by how its score reacts to the attention in {all}"
  }
};
