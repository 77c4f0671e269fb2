// Curves of a training run as SVG: axes with round numbers, and the values under the pointer.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 12, bottom: 20, left: 44 };

/** An SVG element with attributes. */
function shape(name, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
}

/** A figure's name for people: 0.00029 as 2.9e-4, 12345.6 as 12,346. */
export function figure(value) {
  if (value === null) return "not finite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

/** About `count` round numbers within [low, high]. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= 0.6 * raw);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

/** A tick's label: short, since the axis is narrow. */
function tickLabel(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size > 0 && size < 1e-2) return value.toExponential(1).replace(".0e", "e");
  return Number(value.toPrecision(4)).toLocaleString("en");
}

/**
 * Draw a chart into `host` (its width decides the size) and draw it again when the width changes.
 * `series`: [{ name, className, points: [[step, value or null], ...] }], ordered by step; null leaves a gap.
 * Returns a function that ends the watching.
 */
export function drawChart(host, { title, series, height, fromZero = false }) {
  let drawnAt = 0;
  const draw = () => {
    if (host.clientWidth === drawnAt || host.clientWidth === 0) return;
    drawnAt = host.clientWidth;
    host.replaceChildren(chart(title, series, drawnAt, height, fromZero));
  };
  const watcher = new ResizeObserver(draw);
  watcher.observe(host);
  draw();
  return () => watcher.disconnect();
}

function chart(title, series, width, height, fromZero) {
  const area = plotArea(series, width, height, fromZero);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": describe(title, series) });
  svg.append(axes(area));
  for (const { className, points } of series) {
    svg.append(shape("path", { class: `curve ${className}`, d: path(points, area) }));
    if (points.length <= 40) {
      for (const [step, value] of points) {
        if (value !== null) svg.append(shape("circle", { class: `dot ${className}`, cx: area.x(step), cy: area.y(value), r: 2 }));
      }
    }
  }
  const frame = document.createElement("div");
  frame.className = "plot";
  frame.append(svg);
  addHover(frame, svg, series, area);
  return frame;
}

function describe(title, series) {
  const ends = series.map(({ name, points }) => {
    const [step, value] = points.findLast(([, value]) => value !== null) ?? points.at(-1);
    return `${name} ${figure(value)} at step ${step.toLocaleString("en")}`;
  });
  return `${title}: ${ends.join(", ")}`;
}

/** The plot's borders and its scales. */
function plotArea(series, width, height, fromZero) {
  const steps = series.flatMap(({ points }) => points.map(([step]) => step));
  const values = series.flatMap(({ points }) => points.map(([, value]) => value)).filter((value) => value !== null);
  let [firstStep, lastStep] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = values.length ? [fromZero ? 0 : Math.min(...values), Math.max(...values)] : [0, 1];
  if (lastStep === firstStep) lastStep = firstStep + 1;
  if (high === low) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  const room = (high - low) * 0.05;
  [low, high] = [fromZero ? low : low - room, high + room];
  const left = MARGIN.left, right = width - MARGIN.right, top = MARGIN.top, bottom = height - MARGIN.bottom;
  return {
    left, right, top, bottom, low, high, firstStep, lastStep,
    x: (step) => left + ((step - firstStep) / (lastStep - firstStep)) * (right - left),
    y: (value) => bottom - ((value - low) / (high - low)) * (bottom - top),
  };
}

function axes(area) {
  const group = shape("g", { class: "axes", "aria-hidden": "true" });
  for (const value of ticks(area.low, area.high, Math.max(2, Math.floor((area.bottom - area.top) / 28)))) {
    const y = area.y(value);
    group.append(shape("line", { x1: area.left, x2: area.right, y1: y, y2: y }));
    group.append(shape("text", { x: area.left - 6, y: y + 3.5, "text-anchor": "end" }, tickLabel(value)));
  }
  const steps = ticks(area.firstStep, area.lastStep, Math.max(2, Math.floor((area.right - area.left) / 64)));
  for (const step of steps.filter(Number.isInteger)) {
    const x = area.x(step);
    group.append(shape("text", { x, y: area.bottom + 15, "text-anchor": "middle" }, tickLabel(step)));
  }
  return group;
}

/** One line, broken where a value is missing. */
function path(points, area) {
  let pen = "M";
  let result = "";
  for (const [step, value] of points) {
    if (value === null) {
      pen = "M";
      continue;
    }
    result += `${pen}${area.x(step).toFixed(1)} ${area.y(value).toFixed(1)}`;
    pen = "L";
  }
  return result;
}

/** A vertical line at the nearest step and a small table of the values there. */
function addHover(frame, svg, series, area) {
  const rule = shape("line", { class: "rule", y1: area.top, y2: area.bottom, visibility: "hidden" });
  svg.append(rule);
  const table = document.createElement("div");
  table.className = "values";
  table.hidden = true;
  frame.append(table);
  frame.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = area.firstStep + ((event.clientX - box.left - area.left) / (area.right - area.left)) * (area.lastStep - area.firstStep);
    const nearest = series.map((each) => ({ ...each, point: nearestPoint(each.points, at) }));
    const step = nearest.reduce((best, { point }) => (Math.abs(point[0] - at) < Math.abs(best - at) ? point[0] : best), Infinity);
    const x = area.x(step);
    rule.setAttribute("x1", x);
    rule.setAttribute("x2", x);
    rule.setAttribute("visibility", "visible");
    table.replaceChildren(line("", `step ${step.toLocaleString("en")}`));
    for (const { name, className, point } of nearest) {
      // A series logged more rarely says its nearest step where that is another one.
      const where = point[0] === step ? "" : ` (step ${point[0].toLocaleString("en")})`;
      table.append(line(className, `${name} ${figure(point[1])}${where}`));
    }
    table.hidden = false;
    table.classList.toggle("left", x > (area.left + area.right) / 2);
  });
  frame.addEventListener("pointerleave", () => {
    table.hidden = true;
    rule.setAttribute("visibility", "hidden");
  });
}

function line(className, text) {
  const element = document.createElement("div");
  if (className) element.className = `key ${className}`;
  element.textContent = text;
  return element;
}

/** The point with the step nearest to `at`; the points are ordered. */
function nearestPoint(points, at) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < at) low = middle + 1;
    else high = middle;
  }
  const before = points[Math.max(0, low - 1)];
  return Math.abs(before[0] - at) <= Math.abs(points[low][0] - at) ? before : points[low];
}
