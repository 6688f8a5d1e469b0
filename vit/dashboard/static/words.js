// What the page says in words.

import {clamped, CLASS_SPECIFIC, METHOD_NAMES} from "./maps.js";
import {MAP_METHODS} from "./methods.js";

const READOUTS = {token: "the class token", mean: "the mean of all patches", attention: "the pooling query"};
// Shares of the probability that say nothing about one image.
const NOISE = 0.01;

export function percent(share) {
  if (share > 0 && share < 0.01) return "under 1%";
  return `${share > 0.99 && share < 1 ? "over 99" : Math.round(100 * share)}%`;
}

export function times(value) {
  return `${value >= 10 ? Math.round(value) : value.toFixed(1)}×`;
}

export function grouped(number) {
  return number.toLocaleString("en-US");
}

export function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

export function className(info, index) {
  return info.classes[index] ?? `class ${index}`;
}

// What the class is that maps of class-specific methods have beside the predicted one.  `vit explain --target` asks for
// a class of its own, where the true one is not known.
export function otherClass(info) {
  return Number.isInteger(info?.asked) ? "the class asked for" : "the true class";
}

// One sentence on what the map shows.
export function meaning(moment, view, map) {
  const {info, record} = moment;
  const reader = READOUTS[info.readout] ?? "the readout";
  const layer = clamped(view.layer, info.layers);
  const all = info.layers === 1 ? "its one layer" : `all ${info.layers} layers`;
  if (view.method === "raw") {
    const heads = info.heads === 1 ? "" : view.head === null ? `, ${fusionWords(view.fusion)} of its heads`
      : `, head ${clamped(view.head, info.heads) + 1}`;
    return `Brighter patches got more of the attention of ${reader} in layer ${layer + 1}${heads}.`
      + ` This is one layer alone: ${percent(map.kept)} of its attention goes to patches.`;
  }
  if (view.method === "rollout") {
    const through = layer === info.layers - 1 ? all : `layers 1 to ${layer + 1} of ${info.layers}`;
    return `Brighter patches had more influence on ${reader} through ${through}, whatever the class.`;
  }
  const [predicted, label] = record.targets;
  if (view.target === "difference" && map.signed) {
    return `Red patches speak for “${className(info, predicted)}”, which the model predicts,`
      + ` blue ones for “${className(info, label)}”, ${otherClass(info)}; grey ones for neither.`;
  }
  const isTrue = view.target === "true" && label !== null;
  const name = className(info, isTrue ? label : predicted);
  const other = Number.isInteger(info.asked) ? "asked for" : "true";
  const role = label === predicted ? `predicted, and ${other}` : isTrue ? otherClass(info) : "predicted";
  const how = MAP_METHODS[view.method].sentence.replace("{all}", all);
  return `Brighter patches did more for the class “${name}” (${role}), ${how}.`;
}

function fusionWords(fusion) {
  return {mean: "mean", max: "largest value", min: "smallest value"}[fusion];
}

// How far to believe a map: {verdict, good: true | false | null, areas, random, note}.
export function trust(moment, view) {
  const found = moment.faithfulness;
  const nothing = (verdict) => ({verdict, good: null});
  if (!found) return nothing("Not measured for this image at or before this step.");
  if (view.target === "difference" && CLASS_SPECIFIC.includes(view.method)) {
    return nothing("Measured for single maps, not for a difference.");
  }
  const areas = found.areas[view.method], {random} = found.areas;
  if (!areas || !random) return nothing(`Not measured for ${METHOD_NAMES[view.method].toLowerCase()}.`);
  const better = [random.deletion - areas.deletion > NOISE, areas.insertion - random.insertion > NOISE];
  const notes = [];
  if (found.step !== moment.step) notes.push(`at step ${grouped(found.step)}`);
  const {layers} = moment.info;
  if (view.method === "raw" && (clamped(view.layer, layers) < layers - 1 || view.head !== null)) {
    notes.push("for the last layer with all heads");
  } else if (view.method === "rollout" && (clamped(view.layer, layers) < layers - 1 || view.fusion !== "mean")) {
    notes.push("through all layers with the mean of the heads");
  } else if (view.target === "true" && moment.image.label !== moment.answer?.predicted
    && CLASS_SPECIFIC.includes(view.method)) {
    notes.push("for the predicted class");
  }
  const verdicts = {2: "More faithful than random.", 0: "No better than random: do not trust this map."};
  const one = `Better than random by ${better[0] ? "deletion" : "insertion"} only: take this map with care.`;
  const count = Number(better[0]) + Number(better[1]);
  return {verdict: verdicts[count] ?? one, good: count === 2 ? true : count ? null : false, areas, random,
    note: notes.length ? `Measured ${notes.join(", ")}.` : ""};
}

// {text, warns}: whether a few patches soak up attention for nothing.
export function sinks(moment) {
  const {top_mass: top, outliers} = moment.answer.sink;
  const patches = moment.info.grid[0] * moment.info.grid[1];
  const warns = top > Math.max(0.2, 6 / patches);
  const odd = outliers > 0 ? ` Tokens of unusual size: ${percent(outliers)}.` : "";
  if (!warns) return {warns, text: `No sink: the strongest patch takes ${percent(top)} of the attention.${odd}`};
  return {warns, text: `Attention sink: one patch takes ${percent(top)} of the attention. Models park attention on such`
    + ` patches, so it may say little about what is there.${odd}`};
}

export function patchWords(map, index, info) {
  const columns = info.grid[1];
  const place = `Row ${Math.floor(index / columns) + 1}, column ${index % columns + 1}`;
  const value = map.values[index];
  if (!map.signed) return `${place}: ${times(value)} the average`;
  if (Math.abs(value) < 0.05) return `${place}: speaks for neither class`;
  return `${place}: ${times(Math.abs(value))} the average, for ${value > 0 ? "the predicted class" : otherClass(info)}`;
}
