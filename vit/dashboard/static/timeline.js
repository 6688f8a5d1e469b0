// The steps of training: a slider, and playing through them.

import {element, setText, show} from "./dom.js";
import {grouped} from "./words.js";

const SECONDS_TO_PLAY = 6; // through all steps
const [QUICKEST, SLOWEST] = [120, 700]; // ms a step

export function timeline(actions) {
  const play = element("button", {type: "button", class: "play", onclick: () => (timer ? stop() : start())});
  const slider = element("input", {
    type: "range", min: "0", "aria-label": "Training step", oninput: () => { stop(); go(Number(slider.value)); },
  });
  const shown = element("output");
  const root = element("div", {class: "timeline"}, play, slider, shown);
  let steps = [], at = 0, timer = null;

  // the last step is "the latest": with it the view goes along while training goes on
  function go(index) {
    at = index;
    actions.adjust({step: index === steps.length - 1 ? null : steps[index]});
  }

  function start() {
    if (at === steps.length - 1) go(0);
    const pause = Math.max(QUICKEST, Math.min(SLOWEST, 1000 * SECONDS_TO_PLAY / steps.length));
    timer = setInterval(() => {
      go(Math.min(at + 1, steps.length - 1));
      if (at === steps.length - 1) stop();
    }, pause);
    label();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    label();
  }

  function label() {
    setText(play, timer ? "❚❚" : "▶");
    play.setAttribute("aria-label", timer ? "Pause" : "Play through training");
    play.title = play.getAttribute("aria-label");
  }

  label();
  return {root, update(now, step) {
    steps = now;
    show(root, steps.length > 1);
    if (steps.length < 2) return;
    const last = steps.length - 1;
    const found = step === null ? last : steps.findLastIndex((each) => each <= step);
    at = Math.max(0, found);
    slider.max = String(last);
    slider.value = String(at);
    const words = `step ${grouped(steps[at])}`;
    slider.setAttribute("aria-valuetext", words);
    setText(shown, `${words} of ${grouped(steps[last])}${step === null ? " · latest" : ""}`);
  }};
}
