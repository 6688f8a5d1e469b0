// What has been fetched: the runs, and of the probes and pairs what is or was on the page lately.

const MOST_PROBES = 24;
const MOST_PAIRS = 24;

// `changed()` is called whenever something new has come in.
export function makeStore(source, changed) {
  const store = {runs: null, failure: null, refresh, probe, pairs};
  const probes = new Map();
  const records = new Map();

  async function refresh() {
    try {
      const answer = await source.runs();
      if (answer.version !== 1) throw new Error("This page is older than the server: reload it.");
      store.runs = answer.runs;
      store.failure = null;
    } catch (error) {
      store.failure = error.message;
    }
    for (const kept of probes.values()) if (kept.error) kept.mark = null;
    for (const [key, kept] of records) if (kept.error) records.delete(key);
    changed();
  }

  // -> {steps, problems, error, loading}; asks for it, and again once the run has gone on, keeping what is there.
  function probe(run, number) {
    const kept = recent(probes, `${run.run}\n${number}`, MOST_PROBES, () => ({steps: [], problems: [], mark: null}));
    const mark = `${run.steps.length} ${run.steps.at(-1)?.step}`;
    if (kept.mark !== mark && !kept.loading) {
      kept.loading = true;
      source.probe(run.run, number).then(
        (answer) => Object.assign(kept, {steps: answer.steps, problems: answer.problems, error: null}),
        (error) => Object.assign(kept, {error: error.message}),
      ).then(() => { Object.assign(kept, {mark, loading: false}); changed(); });
    }
    return kept;
  }

  // -> {record, error, loading}
  function pairs(run, number, step) {
    const kept = recent(records, `${run.run}\n${number}\n${step}`, MOST_PAIRS, () => ({}));
    if (!kept.record && !kept.error && !kept.loading) {
      kept.loading = true;
      source.pairs(run.run, number, step).then(
        (record) => Object.assign(kept, {record}),
        (error) => Object.assign(kept, {error: error.message}),
      ).then(() => { kept.loading = false; changed(); });
    }
    return kept;
  }

  return store;
}

// The entry of `key`, made where it is missing; the ones not asked for the longest go.
function recent(map, key, most, make) {
  const value = map.get(key) ?? make();
  map.delete(key);
  map.set(key, value);
  if (map.size > most) map.delete(map.keys().next().value);
  return value;
}
