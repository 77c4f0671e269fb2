// The panel's facts of the model and curves of its run.

import { drawChart, figure } from "./chart.js";
import { element } from "./entries.js";

const SMALL = { loss: 150, other: 96 };
const LARGE = { loss: 320, other: 190 };

/** Fill `list` with what the server knows about the model. */
export function showFacts(list, { model, run }) {
  const facts = {
    Parameters: `${shortNumber(model.parameters)} (${model.family})`,
    Context: model.context_tokens === null ? "unlimited" : `${model.context_tokens.toLocaleString("en")} tokens`,
    Device: `${model.device}, ${model.dtype}`,
    [run ? "Run" : "Folder"]: run ? run.directory : model.folder,
  };
  if (run?.step != null) facts.Trained = `${run.step.toLocaleString("en")} of ${run.max_steps.toLocaleString("en")} steps, ${run.state}`;
  list.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}

/** 848,384 as 848 k, 1,234,567,890 as 1.23 B. */
export function shortNumber(value) {
  for (const [size, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${letter}`;
  }
  return String(value);
}

/** Draw the curves there are into `host`; returns a function that takes them away, and null where there are none. */
export function showCurves(host, curves, sizes = SMALL) {
  const charts = [
    { title: "Loss", wide: true, series: [named(curves, "loss", "training"), named(curves, "val_loss", "validation")] },
    { title: "Learning rate", fromZero: true, series: [named(curves, "lr", "learning rate")] },
    { title: "Tokens/s", fromZero: true, series: [named(curves, "tokens_per_sec", "tokens/s")] },
  ]
    .map((chart) => ({ ...chart, series: chart.series.filter(({ points }) => points.length) }))
    .filter(({ series }) => series.length);
  if (!charts.length) return null;
  host.replaceChildren();
  const ends = charts.map((chart) => addChart(host, chart, chart.wide ? sizes.loss : sizes.other));
  return () => ends.forEach((end) => end());
}

/** The same, for the large view. */
export const showLargeCurves = (host, curves) => showCurves(host, curves, LARGE);

function named(curves, key, name) {
  return { name, className: key.replaceAll("_", "-"), points: curves[key] ?? [] };
}

function addChart(host, { title, series, wide, fromZero }, height) {
  const box = element("figure", wide ? "wide" : "");
  const caption = element("figcaption", "", title);
  for (const { name, className, points } of series) {
    const part = element("span", series.length > 1 ? `key ${className}` : "", series.length > 1 ? `${name} ` : "");
    part.append(element("b", "", figure(points.at(-1)[1]))); // where it stands now
    caption.append(part);
  }
  const plot = element("div", "plot-host");
  box.append(caption, plot);
  host.append(box);
  return drawChart(plot, { title, series, height, fromZero });
}
