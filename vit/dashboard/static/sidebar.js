// At the side: which runs, and which image.

import {choice, element, keyed, setText, show} from "./dom.js";
import {confidence, isRight, listedProbes} from "./moment.js";
import {percent} from "./words.js";

export function sidebar(actions) {
  const runs = runList(actions), images = imageList(actions);
  return {root: element("aside", {class: "sidebar"}, runs.root, images.root), update(all, chosen, state, number) {
    runs.update(all, chosen);
    images.update(chosen, state, number);
  }};
}

function runList(actions) {
  const list = element("div", {class: "run-list"});
  const root = element("fieldset", {class: "runs"}, element("legend", {text: "Runs"}), list);

  function make(name) {
    const box = element("input", {type: "checkbox", onchange: () => actions.toggleRun(name, box.checked)});
    return {box, root: element("label", {title: name}, box, element("span", {text: name}))};
  }

  return {root, update(all, chosen) {
    const items = keyed(list, all.map((run) => run.run), make);
    items.forEach((item, i) => { item.box.checked = chosen.includes(all[i]); });
  }};
}

function imageList(actions) {
  const strip = element("div", {class: "strip", role: "group", "aria-label": "Images"});
  const mistakes = element("input", {type: "checkbox", onchange: () => actions.onlyMistakes(mistakes.checked)});
  const filter = element("label", {class: "check"}, mistakes, element("span", {text: "Only mistakes"}));
  const order = choice("Sort", (value) => actions.choose({order: value}));
  const empty = element("p", {class: "note"});
  const root = element("fieldset", {class: "images"}, element("legend", {text: "Images"}),
    element("div", {class: "row"}, filter, order.root), strip, empty);

  function make(number) {
    const image = element("img", {alt: "", draggable: "false"});
    const mark = element("span", {class: "mark"});
    const button = element("button", {type: "button", class: "thumb", onclick: () => actions.choose({probe: number})},
      image, mark);
    return {root: button, image, mark};
  }

  return {root, update(chosen, state, number) {
    order.update([["logged", "as logged"], ["sure", "most confident first"], ["unsure", "least confident first"]],
      state.order);
    mistakes.checked = state.mistakes;
    const lead = chosen[0], probes = lead?.info?.probes ?? [];
    const known = probes.some((probe) => probe.label !== null);
    mistakes.disabled = !known && !state.mistakes;
    filter.title = known ? "" : "The true classes of these images are not known";
    const numbers = listedProbes(chosen, state);
    show(empty, !numbers.length);
    setText(empty, state.mistakes && probes.length ? "No mistakes at this step." : "No images.");
    keyed(strip, numbers, make).forEach((item, i) => fill(item, numbers[i], lead, chosen, state, number));
  }};

  function fill(item, each, lead, chosen, state, number) {
    const probe = lead.info.probes[each];
    const source = `data:image/png;base64,${probe.png}`;
    if (item.image.src !== source) item.image.src = source;
    item.image.classList.toggle("small", Math.max(...lead.info.image) <= 128);
    const marks = chosen.map((run) => isRight(run, each, state.step));
    const sure = percent(confidence(lead, each, state.step));
    setText(item.mark, `${marks.map((right) => ({true: "✓", false: "✗"})[right] ?? "").join("")} ${sure}`.trim());
    item.mark.dataset.right = String(marks.includes(false) ? false : marks.includes(true) ? true : null);
    const said = {true: "right", false: "wrong"}[item.mark.dataset.right] ?? "true class not known";
    const label = `Image ${each + 1}, ${probe.name}: ${said}, confidence ${sure}`;
    item.root.setAttribute("aria-label", label);
    item.root.title = label;
    item.root.setAttribute("aria-pressed", String(each === number));
  }
}
