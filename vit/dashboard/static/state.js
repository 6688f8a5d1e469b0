// What a person has chosen, and the same as parameters of a URL.  Layers and heads count from 1 in the URL, as they do
// on the page, and from 0 in the program; null is "not chosen": the last layer, all heads, the latest step.

export const START = {
  runs: [], probe: null, step: null, method: null, layer: null, head: null, fusion: "mean", target: "predicted",
  look: "overlay", opacity: 0.55, patch: null, mistakes: false, after: null, order: "logged",
};

export const FUSIONS = ["mean", "max", "min"];
export const TARGETS = ["predicted", "true", "difference"];
export const LOOKS = ["overlay", "map", "image"];
export const ORDERS = ["logged", "sure", "unsure"];

// Names joined by commas; the two characters that would be ambiguous are escaped.
const LIST = {
  read: (text) => text.split(",").filter((each) => each).map(decoded),
  write: (names) => names.map((name) => name.replace(/[%,]/g, encodeURIComponent)).join(","),
};
const COUNTED = {read: (text) => whole(text, 1) - 1, write: (value) => String(value + 1)};
const WHOLE = {read: (text) => whole(text, 0), write: String};
const FIELDS = {
  runs: LIST, probe: WHOLE, step: WHOLE, layer: COUNTED, head: COUNTED, after: COUNTED, patch: COUNTED,
  method: {read: (text) => (/^\w{1,40}$/.test(text) ? text : refused()), write: String},
  fusion: oneOf(FUSIONS), target: oneOf(TARGETS), look: oneOf(LOOKS), order: oneOf(ORDERS),
  opacity: {read: (text) => Math.min(100, whole(text, 0)) / 100, write: (value) => String(Math.round(100 * value))},
  mistakes: {read: (text) => text === "1", write: () => "1"},
};

function oneOf(values) {
  return {read: (text) => (values.includes(text) ? text : refused()), write: String};
}

function whole(text, least) {
  return /^\d{1,15}$/.test(text) && Number(text) >= least ? Number(text) : refused();
}

function refused() {
  throw new RangeError("not a value of this parameter");
}

function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

// What a URL says; a parameter that makes no sense counts as not there.
export function stateFrom(parameters) {
  const state = {...START};
  for (const [name, field] of Object.entries(FIELDS)) {
    if (!(name in parameters)) continue;
    try { state[name] = field.read(parameters[name]); } catch (error) { if (!(error instanceof RangeError)) throw error; }
  }
  return state;
}

// Only what differs from the start.
export function parametersOf(state) {
  const parameters = {};
  for (const [name, field] of Object.entries(FIELDS)) {
    if (JSON.stringify(state[name]) !== JSON.stringify(START[name])) parameters[name] = field.write(state[name]);
  }
  return parameters;
}
