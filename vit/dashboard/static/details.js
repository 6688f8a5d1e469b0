// Beside the map: what the model answers, how far to believe the map, and whether attention leaks into sinks.

import {element, setText, show} from "./dom.js";
import {className, percent, sinks, trust} from "./words.js";

export function details() {
  const top = element("ol", {class: "top"});
  const verdict = element("p", {class: "verdict"});
  const deletion = measure("Deletion", "brightest patches taken away first: lower is better");
  const insertion = measure("Insertion", "brightest patches put in first: higher is better");
  const measures = element("dl", {class: "measures"}, ...deletion.nodes, ...insertion.nodes);
  const note = element("p", {class: "note"});
  const sink = element("p", {class: "sink"});
  const root = element("section", {class: "details"},
    element("h3", {text: "What the model answers"}), top,
    element("h3", {text: "Can you trust this map?"}), verdict, measures, note, sink);

  return {root, update(moment, state) {
    const {info, answer, image} = moment;
    show(root, Boolean(answer));
    if (!answer) return;
    top.replaceChildren(...answer.top.map(([index, share]) => element("li", {class: index === image.label ? "true" : ""},
      element("span", {class: "name", text: className(info, index), title: className(info, index)}),
      meter(share), element("span", {class: "figure", text: percent(share)}))));
    const found = trust(moment, state);
    setText(verdict, found.verdict);
    verdict.dataset.good = String(found.good);
    show(measures, Boolean(found.areas));
    if (found.areas) {
      deletion.update(found.areas.deletion, found.random.deletion);
      insertion.update(found.areas.insertion, found.random.insertion);
    }
    setText(note, found.note ?? "");
    const soaked = sinks(moment);
    setText(sink, soaked.text);
    sink.classList.toggle("warns", soaked.warns);
  }};
}

function meter(share) {
  const fill = element("span", {class: "fill"});
  fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return element("span", {class: "meter", "aria-hidden": "true"}, fill);
}

// A figure with a bar, and a mark where the random map is.
function measure(name, rule) {
  const [figure, baseline] = [element("b"), element("span", {class: "baseline"})];
  const fill = element("span", {class: "fill"}), mark = element("span", {class: "mark"});
  const bar = element("span", {class: "meter", "aria-hidden": "true"}, fill, mark);
  return {
    nodes: [element("dt", {text: name}),
      element("dd", {}, element("span", {class: "figures"}, figure, baseline), bar,
        element("small", {text: rule}))],
    update(area, random) {
      setText(figure, area.toFixed(2));
      setText(baseline, ` random ${random.toFixed(2)}`);
      fill.style.width = `${100 * Math.min(1, area)}%`;
      mark.style.left = `${100 * Math.min(1, random)}%`;
    },
  };
}
