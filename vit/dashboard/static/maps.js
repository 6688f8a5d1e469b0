// Which numbers a view shows: from a probe's record and the view's settings to a map over the patches.

import {MAP_METHODS} from "./methods.js";
import {rowOf, columnOf, fused, shares, sumOf} from "./unpack.js";

const NAMES = Object.keys(MAP_METHODS);
export const CLASS_SPECIFIC = NAMES.filter((name) => MAP_METHODS[name].byClass);
export const METHOD_NAMES = Object.fromEntries(NAMES.map((name) => [name, MAP_METHODS[name].title]));

// Brightest colour at three times the average patch or at the largest value, whichever is more: a map that is nearly
// uniform, as before training, looks uniform instead of having its noise blown up.
const LEAST_TOP = 3;

// -> {values: (P,) multiples of the average patch, signed, top, kept: share of the attention that patches get}
export function mapOf(record, info, view) {
  const layer = clamped(view.layer, info.layers);
  if (view.method === "raw") {
    const row = layerRow(record, info, layer, view.head, view.fusion);
    return amounts(shares(row), sumOf(row));
  }
  if (view.method === "rollout") return amounts(shares(rowOf(record.rollout[view.fusion], layer)));
  const packed = record[view.method];
  if (!packed) throw new Error(`${METHOD_NAMES[view.method] ?? view.method} was not logged at this step`);
  const [predicted, label] = record.targets;
  if (view.target === "predicted" || label === predicted) {
    if (view.target === "difference") throw new Error("The predicted class is the true one: no difference to show");
    return amounts(shares(rowOf(packed, 0)));
  }
  if (label === null) throw new Error("The true class of this image is not known");
  if (view.target === "true") return amounts(shares(rowOf(packed, 1)));
  const [first, second] = [shares(rowOf(packed, 0)), shares(rowOf(packed, 1))];
  return scaled(first.map((value, i) => value - second[i]), true);
}

// Attention of the readout in one layer: of one head, or of all heads put together.
export function layerRow(record, info, layer, head, fusion) {
  const first = layer * info.heads;
  if (head !== null) return rowOf(record.rows, first + clamped(head, info.heads));
  return fused(Array.from({length: info.heads}, (_, h) => rowOf(record.rows, first + h)), fusion);
}

// Where patch `i` looks, and who looks at it, in one layer and head -> two maps.
export function pairsOf(record, info, view, i) {
  const [layers, heads, tokens] = record.attention.shape;
  const head = heads === 1 || view.head === null ? null : clamped(view.head, heads);
  const layer = clamped(view.layer, layers);
  const from = [], to = [];
  for (const h of head === null ? Array(heads).keys() : [head]) {
    const first = (layer * heads + h) * tokens;
    from.push(rowOf(record.attention, first + info.prefix + i).subarray(info.prefix));
    to.push(columnOf(record.attention, first, tokens, info.prefix + i).subarray(info.prefix));
  }
  return {from: amounts(shares(fused(from, "mean"))), to: amounts(shares(fused(to, "mean"))), head, layer};
}

// The last one where none is chosen, or where a run has fewer than another.
export function clamped(index, count) {
  return index === null ? count - 1 : Math.min(index, count - 1);
}

export function amounts(values, kept = 1) {
  return {...scaled(values, false), kept};
}

function scaled(shareOf, signed) {
  const values = shareOf.map((value) => value * shareOf.length);
  let top = LEAST_TOP;
  for (const value of values) top = Math.max(top, Math.abs(value));
  return {values, signed, top, kept: 1};
}

export function brightest(map) {
  let best = 0;
  map.values.forEach((value, i) => { if (value > map.values[best]) best = i; });
  return best;
}
