// What TensorBoard calls: the viewer with the plugin's routes as its source.

import {mount} from "./viewer.js";
import {tensorboardHost} from "./host.js";

export function render() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("./viewer.css", import.meta.url).href;
  document.head.append(style);
  document.documentElement.lang = "en";
  document.title = "Attention";
  const source = {
    runs: () => fetched("runs", {}),
    probe: (run, probe) => fetched("probe", {run, probe}),
    pairs: (run, probe, step) => fetched("pairs", {run, probe, step}),
  };
  // waits for the style, so that nothing jumps
  const start = () => mount(document.body, source, {host: tensorboardHost(), poll: true});
  style.addEventListener("load", start, {once: true});
  style.addEventListener("error", start, {once: true});
}

async function fetched(route, parameters) {
  const url = new URL(`./${route}`, import.meta.url);
  url.search = new URLSearchParams(parameters);
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new Error("TensorBoard does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => ({error: `TensorBoard answered ${response.status}`}));
  if (!response.ok) throw new Error(answer.error ?? `TensorBoard answered ${response.status}`);
  return answer;
}
