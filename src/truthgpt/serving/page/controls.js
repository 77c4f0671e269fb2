// The sampling controls: a slider and a number for each, kept within their range.

const STORED = "truthgpt.sampling";

const CONTROLS = [
  { key: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, note: "0 always takes the likeliest token" },
  { key: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, value: 1, note: "sample among the likeliest tokens that sum up to this; 1: all" },
  { key: "top_k", label: "Top-k", min: 0, max: 200, step: 1, value: 0, note: "sample among this many tokens; 0: all" },
  { key: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.01, value: 1, note: "1: none" },
  { key: "max_tokens", label: "Max new tokens", min: 1, max: 2048, step: 1, value: 256, note: "tokens to write at most" },
];

/** Builds the controls in `host`. `values()` gives what to send; `reset()` restores the defaults. */
export function buildControls(host) {
  const parts = new Map(CONTROLS.map((control) => [control.key, addControl(host, control, save)]));
  const seed = addSeed(host, save);

  function save() {
    const values = Object.fromEntries([...parts].map(([key, part]) => [key, part.get()]));
    try {
      localStorage.setItem(STORED, JSON.stringify({ ...values, seed: seed.value }));
    } catch {
      // Storage is off in this browser: the settings last as long as the page.
    }
  }

  function restore() {
    let stored = {};
    try {
      stored = JSON.parse(localStorage.getItem(STORED)) ?? {};
    } catch {
      return; // off, or not ours: the defaults stand
    }
    for (const [key, part] of parts) if (Number.isFinite(stored[key])) part.set(stored[key]);
    if (/^\d+$/.test(stored.seed ?? "")) seed.value = stored.seed;
  }

  restore();
  return {
    /** Sampling parameters of one request; without a fixed seed each has a new one. */
    values() {
      const values = Object.fromEntries([...parts].map(([key, part]) => [key, part.get()]));
      return { ...values, seed: seed.value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(seed.value) };
    },
    /** An answer cannot be longer than the model's context. */
    limitTokens(contextTokens) {
      if (contextTokens) parts.get("max_tokens").limit(contextTokens);
    },
    reset() {
      for (const { key, value } of CONTROLS) parts.get(key).set(value);
      seed.value = "";
      save();
    },
  };
}

function addControl(host, { key, label, min, max, step, value, note }, changed) {
  const row = document.createElement("div");
  row.className = "control";
  const name = document.createElement("label");
  name.textContent = label;
  name.htmlFor = key;
  name.title = note;
  const number = input({ type: "number", id: key, min, max, step, value, title: note, inputMode: "decimal" });
  const slider = input({ type: "range", min, max, step, value, title: note });
  slider.setAttribute("aria-label", label);
  const within = (text) => {
    if (text === "" || Number.isNaN(Number(text))) return value;
    const wanted = step === 1 ? Math.round(Number(text)) : Number(text);
    return Math.min(Number(number.max), Math.max(min, wanted));
  };
  const set = (wanted) => {
    number.value = slider.value = String(within(wanted));
  };
  slider.addEventListener("input", () => {
    number.value = slider.value;
    changed();
  });
  number.addEventListener("change", () => {
    set(number.value);
    changed();
  });
  row.append(name, slider, number);
  host.append(row);
  return {
    get: () => within(number.value), // as typed and perhaps not yet left: Enter in the prompt box sends it too
    set,
    limit: (ceiling) => {
      number.max = slider.max = String(ceiling);
      set(number.value);
    },
  };
}

function addSeed(host, changed) {
  const row = document.createElement("div");
  row.className = "control";
  const name = document.createElement("label");
  name.textContent = "Seed";
  name.htmlFor = "seed";
  name.title = "the same seed and settings write the same answer";
  const seed = input({ type: "text", id: "seed", placeholder: "random", inputMode: "numeric", title: name.title });
  seed.addEventListener("input", () => {
    seed.value = seed.value.replace(/\D/g, "").slice(0, 10);
    changed();
  });
  row.append(name, seed);
  host.append(row);
  return seed;
}

function input(properties) {
  const element = document.createElement("input");
  // The range first: a value outside a slider's default of 0 to 100 would be cut.
  for (const key of ["type", "min", "max", "step", "value"]) if (key in properties) element[key] = properties[key];
  return Object.assign(element, properties);
}
