// Above the maps: which map is shown, and how.

import {choice, element, segments, setText, show} from "./dom.js";
import {CLASS_SPECIFIC, METHOD_NAMES} from "./maps.js";
import {MAP_METHODS} from "./methods.js";
import {headOptions, layerOptions} from "./patchpanel.js";
import {otherClass} from "./words.js";

export function controls(actions) {
  const method = choice("Method", (value) => actions.choose({method: value}));
  const target = segments("Class", [["predicted", "Predicted"], ["true", "True"], ["difference", "Difference"]],
    (value) => actions.choose({target: value}));
  const layer = choice("Layer", (value) => actions.choose({layer: value === "" ? null : Number(value)}));
  const head = choice("Head", (value) => actions.choose({head: value === "" ? null : Number(value)}));
  const fusion = choice("Head fusion", (value) => actions.choose({fusion: value}));
  const look = segments("Show", [["overlay", "Overlay"], ["map", "Map"], ["image", "Image"]],
    (value) => actions.choose({look: value}));
  const opacity = element("input", {
    type: "range", min: "0", max: "100", oninput: () => actions.adjust({opacity: Number(opacity.value) / 100}),
  });
  const opacityLabel = element("label", {class: "choice"}, element("span", {text: "Opacity"}), opacity);
  const link = element("button", {type: "button", class: "link", text: "Copy link", onclick: copy});
  const root = element("div", {class: "controls", role: "group", "aria-label": "What is shown"},
    method.root, target.root, layer.root, head.root, fusion.root, look.root, opacityLabel, link);

  async function copy() {
    const done = await copied(actions.link());
    setText(link, done ? "Copied" : "Copy the address above");
    setTimeout(() => setText(link, "Copy link"), 2000);
  }

  return {root, update(runs, state, columns) {
    const infos = runs.map((run) => run.info).filter((info) => info);
    show(root, infos.length > 0);
    if (!infos.length) return;
    const methods = Object.keys(METHOD_NAMES).filter((name) => infos.some((info) => info.methods.includes(name)));
    method.update(methods.map((name) => [name, METHOD_NAMES[name]]), state.method);
    method.select.title = MAP_METHODS[state.method]?.hint ?? "";
    const deepest = infos.reduce((a, b) => (b.layers > a.layers ? b : a));
    const widest = infos.reduce((a, b) => (b.heads > a.heads ? b : a));
    show(target.root, CLASS_SPECIFIC.includes(state.method));
    const asked = infos.every((info) => Number.isInteger(info.asked));
    target.update(state.target, unavailable(columns), {true: asked ? "Asked for" : "True"});
    show(layer.root, ["raw", "rollout"].includes(state.method));
    setText(layer.root.firstChild, state.method === "rollout" ? "Through layer" : "Layer");
    layer.update(layerOptions(deepest), state.layer === null || state.layer >= deepest.layers ? "" : String(state.layer));
    show(head.root, state.method === "raw");
    head.update(headOptions(widest), state.head === null ? "" : String(state.head));
    show(fusion.root, state.method === "rollout" || (state.method === "raw" && state.head === null));
    fusion.update([["mean", "mean"], ["max", "largest"], ["min", "smallest"]], state.fusion);
    look.update(state.look);
    if (document.activeElement !== opacity) opacity.value = String(Math.round(100 * state.opacity));
    opacity.disabled = state.look !== "overlay";
  }};
}

// Targets that no column can show, with the reason.
function unavailable(columns) {
  const found = columns.map(({record, image, info}) => {
    if (!hasOther(info, image)) return "The true class of this image is not known";
    return record && record.targets[0] === record.targets[1] ? `The predicted class is ${otherClass(info)}` : "";
  });
  if (!found.length || found.includes("")) return {};
  const known = columns.some(({image, info}) => hasOther(info, image));
  return known ? {difference: found[0]} : {true: found[0], difference: found[0]};
}

function hasOther(info, image) {
  return Number.isInteger(info?.asked) || image?.label !== null;
}

// Without https a browser has no clipboard to offer; the old way still works there.
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", {class: "offscreen", readonly: true});
    area.value = text;
    document.body.append(area);
    const focused = document.activeElement;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}
