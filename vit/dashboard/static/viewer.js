// The viewer: puts the parts together, keeps what is chosen, and keeps it in the URL.

import {column} from "./column.js";
import {controls} from "./controls.js";
import {element, keyed, setText, show} from "./dom.js";
import {isRight, listedProbes, momentOf, samePlace, stepsOf} from "./moment.js";
import {makeStore} from "./store.js";
import {METHOD_NAMES} from "./maps.js";
import {parametersOf, stateFrom} from "./state.js";
import {sidebar} from "./sidebar.js";
import {timeline} from "./timeline.js";
import {windowHost} from "./host.js";

const POLL = 6000; // ms
const URL_PAUSE = 300; // ms; browsers allow only so many changes of the address a minute

const INTRODUCTION = "What a Vision Transformer looks at: brighter patches count more. Point at a patch to see what it looks "
  + "at.";
const FORMING = " Move the slider to watch that form over training.";
const EMPTY = "There is no attention in this log yet. Training writes it by itself: run “vit train”, and point "
  + "TensorBoard at its folder with “tensorboard --logdir runs”. This page looks again every few seconds.";

// `source` has runs(), probe(run, i), pairs(run, i, step), each giving a promise of what the route of that name gives.
export function mount(root, source, {url = true, host = windowHost(), poll = false} = {}) {
  let state = stateFrom(url ? host.read() : {});
  const opening = {run: undefined, probe: undefined}; // decided once, so that new data do not change the picture
  let hovered = null, drawing = 0, writing = 0, shownColumns = [];
  const store = makeStore(source, draw);
  const actions = {
    choose: (changes) => change(changes, true),
    adjust: (changes) => change(changes, false),
    toggleRun, onlyMistakes,
    hover: (index, grid) => { hovered = index === null ? null : {index, grid}; point(); },
    pin: (index, grid) => { hovered = null; pin(index, grid); },
    link: () => host.link(parametersOf(settled())),
  };
  const side = sidebar(actions), bar = controls(actions), time = timeline(actions);
  const columns = element("div", {class: "columns"});
  const failure = element("p", {class: "failure", role: "alert", hidden: true});
  const empty = element("p", {class: "empty", role: "status", text: "Reading the log…"});
  const introduction = element("p", {text: INTRODUCTION});
  const main = element("main", {}, bar.root, time.root, columns);
  const frame = element("div", {class: "frame"}, side.root, main);
  const page = element("div", {class: "vit-viewer"},
    element("header", {class: "page"}, element("h1", {text: "Attention"}), introduction),
    failure, empty, frame);
  root.append(page);
  dress();
  host.onTheme(dress);
  if (url) host.onChange(() => { clearTimeout(writing); state = stateFrom(host.read()); hovered = null; draw(); });
  store.refresh();
  // a tab that is not in front has no width
  if (poll) setInterval(() => { if (!document.hidden && document.documentElement.clientWidth) store.refresh(); }, POLL);

  function dress() {
    page.dataset.theme = host.dark() ? "dark" : "light";
  }

  // Choices of their own get an entry in the browser's history; sliding and playing do not.
  function change(changes, own) {
    if (url && own) { clearTimeout(writing); host.write(parametersOf(state), false); }
    state = {...state, ...changes};
    if (url && own) host.write(parametersOf(state), true);
    else if (url) { clearTimeout(writing); writing = setTimeout(() => host.write(parametersOf(state), false), URL_PAUSE); }
    draw();
  }

  function chosenRuns() {
    const found = state.runs.map((name) => store.runs.find((run) => run.run === name)).filter((run) => run);
    if (found.length) return found;
    const usable = store.runs.filter((run) => run.info && run.steps.length);
    const name = (opening.run ??= usable.at(-1)?.run); // names often end in a date: the newest
    return store.runs.filter((run) => run.run === name).concat(store.runs.slice(-1)).slice(0, 1);
  }

  // The state with everything that was left open decided.
  function settled() {
    const runs = chosenRuns();
    const infos = runs.map((run) => run.info).filter((info) => info);
    const has = (name) => infos.some((info) => info.methods.includes(name));
    const method = has(state.method) ? state.method : Object.keys(METHOD_NAMES).find(has) ?? null;
    if (runs[0].steps.length) opening.probe ??= firstProbe(runs);
    return {...state, runs: runs.map((run) => run.run), method, probe: state.probe ?? opening.probe ?? 0};
  }

  function firstProbe(runs) {
    const listed = listedProbes(runs, state);
    return listed.find((i) => isRight(runs[0], i, null) === false) ?? listed[0];
  }

  function toggleRun(name, on) {
    const names = chosenRuns().map((run) => run.run).filter((each) => each !== name);
    change({runs: on ? [...names, name] : names.length ? names : [name]}, true);
  }

  function onlyMistakes(on) {
    const listed = listedProbes(chosenRuns(), {...state, mistakes: on});
    const stays = !on || !listed.length || listed.includes(settled().probe);
    change({mistakes: on, ...(stays ? {} : {probe: listed[0]})}, true);
  }

  function pin(index, grid) {
    const lead = chosenRuns()[0]?.info?.grid;
    change({patch: index === null || !lead ? null : samePlace(index, grid, lead)}, false);
    point();
  }

  function pointed() {
    const lead = chosenRuns()[0]?.info?.grid;
    if (hovered) return hovered;
    if (state.patch === null || !lead || state.patch >= lead[0] * lead[1]) return null;
    return {index: state.patch, grid: lead, pinned: true};
  }

  function point() {
    const now = pointed();
    for (const each of shownColumns) each.point(now);
  }

  function draw() {
    drawing ||= requestAnimationFrame(() => { drawing = 0; drawNow(); });
  }

  function drawNow() {
    show(failure, Boolean(store.failure));
    setText(failure, store.failure ? `The log cannot be read just now: ${store.failure}` : "");
    show(frame, Boolean(store.runs?.length));
    show(empty, !store.runs?.length);
    if (store.runs) setText(empty, EMPTY);
    if (!store.runs?.length) return;
    const runs = chosenRuns(), view = settled();
    const moments = runs.map((run) => momentOf(run, view.probe, view.step, store));
    side.update(store.runs, runs, view, view.probe);
    bar.update(runs, view, moments);
    time.update(stepsOf(runs), view.step);
    setText(introduction, INTRODUCTION + (stepsOf(runs).length > 1 ? FORMING : ""));
    shownColumns = keyed(columns, view.runs, (name) => column(name, store, actions));
    columns.classList.toggle("several", runs.length > 1);
    const now = pointed();
    shownColumns.forEach((each, i) => each.update(moments[i], view, now));
  }
}
