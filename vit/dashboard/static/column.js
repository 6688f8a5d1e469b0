// One run: its map with all that belongs to it.

import {brightest, mapOf} from "./maps.js";
import {details} from "./details.js";
import {element, setText, show} from "./dom.js";
import {gradient} from "./draw.js";
import {headGrid} from "./headgrid.js";
import {legend, mainMap} from "./mapview.js";
import {patchPanel} from "./patchpanel.js";
import {samePlace} from "./moment.js";
import {tokenPanel} from "./tokens.js";
import {className, counted, grouped, meaning, percent} from "./words.js";

export function column(name, store, actions) {
  const answer = element("p", {class: "answer"});
  const facts = element("p", {class: "facts"});
  const problems = element("ul", {class: "problems", role: "status"});
  const sentence = element("p", {class: "meaning"});
  const message = element("p", {class: "message", role: "status"});
  const map = mainMap(actions), colours = legend(gradient);
  const panel = patchPanel(actions), answers = details(), heads = headGrid(actions);
  const tokens = tokenPanel(actions);
  const stage = element("div", {class: "stage"}, map.root, colours.root);
  const body = element("div", {class: "body"}, stage, panel.root, answers.root, tokens.root, heads.root);
  const root = element("article", {class: "run", "aria-label": `Run ${name}`},
    element("header", {}, element("h2", {text: name}), facts), problems, answer, sentence,
    element("div", {class: "fit"}, message, body));
  let moment = null, state = null, numbers = null;

  function update(now, settings, pointed) {
    [moment, state] = [now, settings];
    const lines = [...moment.run.problems, ...moment.problems];
    problems.replaceChildren(...lines.map((text) => element("li", {text})));
    show(problems, lines.length > 0);
    busy(now.loading);
    const {info, image, record} = moment;
    setText(facts, info ? factsOf(moment) : "");
    writeAnswer(answer, moment);
    numbers = null;
    let trouble = null;
    if (!info) trouble = "Nothing of this run can be shown.";
    else if (!image) trouble = `This run has ${info.probes.length} images: there is no image ${moment.number + 1}.`;
    else if (!record) trouble = moment.loading ? "Fetching the maps…" : "There are no maps of this image.";
    else try { numbers = mapOf(record, info, state); } catch (error) { trouble = `${error.message}.`.replace("..", "."); }
    setText(message, trouble ?? "");
    show(message, trouble !== null);
    show(body, Boolean(image));
    setText(sentence, numbers ? meaning(moment, state, numbers) : "");
    if (!image) return;
    map.update(image, info, numbers, state);
    colours.update(numbers, info);
    answers.update(moment, state);
    attempt(heads.root, record, () => heads.update(moment, state));
    attempt(tokens.root, record, () => tokens.update(moment, state));
    point(pointed);
  }

  // Only what hangs on the patch under the cursor: this has to be quick.
  function point(pointed) {
    if (!moment?.image) return;
    const {grid} = moment.info;
    const index = pointed ? samePlace(pointed.index, pointed.grid, grid) : numbers ? brightest(numbers) : 0;
    map.point(index, Boolean(pointed), Boolean(pointed?.pinned));
    tokens.point(index);
    const {pairsStep} = moment;
    const pairs = pairsStep === null || pairsStep === undefined ? null : store.pairs(moment.run, moment.number, pairsStep);
    busy(moment.loading || pairs?.loading);
    attempt(panel.root, moment.record, () => panel.update(moment, state, numbers, index, pairs));
  }

  // What is shown is about to change: said to whoever cannot see the sentence that says so.
  function busy(on) {
    root.setAttribute("aria-busy", String(Boolean(on)));
  }

  return {root, update, point};
}

// A part that cannot be drawn from what was logged is left out; the rest stays.
function attempt(part, record, draw) {
  show(part, Boolean(record));
  if (!record) return;
  try { draw(); } catch (error) { console.warn("the Attention tab leaves out a part:", error.message); show(part, false); }
}

function factsOf({info, step, run}) {
  const registers = info.prefix > 1 ? ` and ${counted(info.prefix - 1, "register")}` : "";
  const still = step === null || (step === 0 && run.steps.length === 1); // nothing that has steps
  const at = still ? "" : `step ${grouped(step)} · `;
  return `${at}${counted(info.layers, "layer")}, ${counted(info.heads, "head")}, `
    + `${info.grid[0]} × ${info.grid[1]} patches${registers}`;
}

function writeAnswer(node, {info, image, answer}) {
  show(node, Boolean(answer));
  if (!answer) return;
  const predicted = element("strong", {text: className(info, answer.predicted)});
  const sure = ` ${percent(answer.probability)}`;
  if (image.label === null) {
    node.dataset.right = "null";
    return node.replaceChildren("Predicted ", predicted, sure);
  }
  const right = image.label === answer.predicted;
  node.dataset.right = String(right);
  const mark = element("span", {class: "mark", text: right ? "✓ Right" : "✗ Wrong"});
  if (right) return node.replaceChildren(mark, " Predicted ", predicted, sure);
  const known = answer.label_probability;
  const rest = known === null || known === undefined ? "" : ` ${percent(known)}`;
  node.replaceChildren(mark, " Predicted ", predicted, `${sure}, but it is `,
    element("strong", {text: className(info, image.label)}), rest);
}
