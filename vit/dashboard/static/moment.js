// One run at one step for one probe image: what is there to be shown, and of which steps.

// The last one at or before a step, or the first where there is none; null is the latest.
export function atStep(entries, step, stepOf = (entry) => entry.step) {
  if (step === null) return entries.at(-1) ?? null;
  return entries.findLast((entry) => stepOf(entry) <= step) ?? entries[0] ?? null;
}

export function momentOf(run, number, step, store) {
  const {info} = run;
  const image = info?.probes[number] ?? null;
  const moment = {run, info, image, number, record: null, answer: null, step: null, faithfulness: null, problems: []};
  if (!image) return moment;
  const probe = store.probe(run, number);
  moment.record = atStep(probe.steps, step);
  moment.loading = probe.loading && !probe.steps.length;
  moment.problems = probe.error ? [probe.error] : probe.problems;
  const entry = atStep(run.steps, moment.record?.step ?? step);
  moment.step = moment.record?.step ?? entry?.step ?? null;
  moment.answer = entry?.probes[number] ?? null;
  const measured = run.steps.filter((each) => each.probes[number]?.faithfulness && each.step <= moment.step).at(-1);
  if (measured) moment.faithfulness = {step: measured.step, areas: measured.probes[number].faithfulness};
  if (moment.step !== null) moment.pairsStep = atStep(run.pairs, moment.step, (each) => each);
  return moment;
}

// All steps of the chosen runs, ascending.
export function stepsOf(runs) {
  return [...new Set(runs.flatMap((run) => run.steps.map((entry) => entry.step)))].sort((a, b) => a - b);
}

// Of probe `number`: true, false, or null where the class is not known.
export function isRight(run, number, step) {
  const label = run.info?.probes[number]?.label ?? null;
  const answer = atStep(run.steps, step)?.probes[number];
  return label === null || !answer ? null : answer.predicted === label;
}

export function confidence(run, number, step) {
  return atStep(run.steps, step)?.probes[number]?.probability ?? 0;
}

// The numbers of the probe images in the order and with the filter that are chosen.
export function listedProbes(runs, state) {
  const lead = runs[0];
  let numbers = [...(lead?.info?.probes ?? []).keys()];
  if (state.mistakes) numbers = numbers.filter((i) => runs.some((run) => isRight(run, i, state.step) === false));
  if (state.order !== "logged") {
    const sign = state.order === "sure" ? -1 : 1;
    numbers.sort((a, b) => sign * (confidence(lead, a, state.step) - confidence(lead, b, state.step)));
  }
  return numbers;
}

// The patch at the same place in another grid.
export function samePlace(index, [rows, columns], [otherRows, otherColumns]) {
  const row = Math.floor((Math.floor(index / columns) + 0.5) / rows * otherRows);
  const column = Math.floor((index % columns + 0.5) / columns * otherColumns);
  return Math.min(otherRows - 1, row) * otherColumns + Math.min(otherColumns - 1, column);
}
