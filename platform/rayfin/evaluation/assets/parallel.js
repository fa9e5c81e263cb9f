// Parallel coordinates over the swept parameters, with a brush on every axis.

const AXIS_SPACE = 110;
const NOT_USED = "–";

/** Pixels that the texts of an axis take to its left and right, about. */
function roomOf(column) {
  const longest = (texts) => 6.8 * Math.max(0, ...texts.map((text) => text.length));
  const half = longest(headers(column)) / 2 + 6;
  return [half, Math.max(half, 14 + longest(tickTexts(column)), column.none ? 90 : 0)];
}

function tickTexts({ scale: { kind, ticks, label } }) {
  return kind === "choice" ? ticks.map((tick) => clipped(label(tick), 14)) : showTicks(ticks);
}

/** The section above the name of a setting, and how its axis is divided. */
function headers(column) {
  const dot = column.title.lastIndexOf(".");
  const above = [column.title.slice(0, dot + 1), column.unit].filter(Boolean).join(" · ");
  return [above, clipped(column.title.slice(dot + 1), 22)];
}

function parameterScale(parameter, top, bottom) {
  if (parameter.kind === "choice") {
    const places = parameter.choices.map((_, i) => i);
    const only = places.length === 1;
    const place = (i) => (only ? (top + bottom) / 2 : bottom - (i / (places.length - 1)) * (bottom - top));
    return { kind: "choice", place, ticks: places, label: (i) => parameter.choices[i] };
  }
  const values = parameter.values.filter((v) => v !== null && (parameter.kind !== "log" || v > 0));
  const low = Math.min(parameter.lower, ...values);
  const high = Math.max(parameter.upper, ...values);
  return { ...scale(parameter.kind, low, high, bottom, top), label: show };
}

function metricScale(report, top, bottom) {
  const range = extent(report.trials.map((t) => t.metric).filter((v) => v !== null));
  const ends = report.metric.mode === "min" ? [top, bottom] : [bottom, top];
  const inner = scale("linear", range.low, range.high, ...ends);
  const place = (value) => Math.min(bottom, Math.max(top, inner.place(value)));
  return { ...inner, place, label: show };
}

function drawParallel(figure, report, page) {
  const plot = figure.querySelector(".plot");
  if (!report.parameters.length) return nothing(plot, "The sweep varied no parameter.");
  if (!report.trials.length) return nothing(plot, "No trial was started.");
  const scored = ranked(report);
  const columns = report.parameters.map((p) => ({ ...p, title: p.name, unit: p.kind === "log" ? "log scale" : "" }));
  if (scored.length) {
    const values = report.trials.map((t) => t.metric);
    columns.push({ title: report.metric.label, unit: report.metric.unit, values, metric: true });
  }
  // What a trial's method does not have is a place of its own, below the axis.
  const gaps = columns.some((c) => !c.metric && c.values.includes(null));
  const [top, bottom] = [52, 344];
  for (const column of columns) {
    column.scale = column.metric ? metricScale(report, top, bottom) : parameterScale(column, top, bottom);
    if (!column.metric && column.values.includes(null)) column.none = bottom + 24;
    [column.left, column.right] = roomOf(column);
  }
  // On a narrow screen the chart scrolls sideways rather than squeezing its axes together.
  const apart = columns.slice(1).map((c, i) => Math.max(AXIS_SPACE, columns[i].right + c.left));
  const [first, last] = [Math.max(30, columns[0].left), columns[columns.length - 1].right + 4];
  const needed = apart.reduce((sum, space) => sum + space, first + last);
  const wide = Math.max(plot.clientWidth || 720, Math.ceil(needed));
  const best = report.trials.find((t) => t.best);
  const { svg, width } = canvas(plot, gaps ? 388 : 360, "Parallel coordinates of the swept parameters", [
    `A line for each of ${report.trials.length} trials over ${columns.length} axes.`,
    best && `The best, #${best.number}, has ${page.settings(best).join(", ")}.`,
  ], wide);
  const spare = columns.length > 1 ? (width - needed) / (columns.length - 1) : 0;
  let at = first;
  columns.forEach((column, index) => {
    column.x = at;
    at += (apart[index] ?? 0) + spare;
  });
  const lines = draw(svg, "g", { class: report.trials.length > 60 ? "crowd" : "" });
  const hits = [];
  // Worst first, the best on top; those without a score lie beneath.
  const unscored = report.trials.filter((t) => t.metric === null);
  for (const trial of [...unscored, ...scored.reverse()]) {
    const rank = scored.length > 1 ? scored.indexOf(trial) / (scored.length - 1) : 1;
    const group = series(lines, trial, trial.metric === null ? "unscored" : "rank");
    group.style.setProperty("--rank", rank);
    const points = columns.map((c) => {
      const value = c.values[trial.number - 1];
      if (value === null) return c.metric ? null : [c.x, c.none];
      return c.kind === "log" && value <= 0 ? null : [c.x, c.scale.place(value)];
    });
    const path = draw(group, "path", { class: "trial-line", d: broken(points) });
    if (!path.getAttribute("d")) path.remove();
    points.forEach((point, i) => {
      if (!point) return;
      const value = columns[i].values[trial.number - 1];
      const shown = value === null ? NOT_USED : columns[i].scale.label(value);
      hits.push({ x: point[0], y: point[1], trial, lines: [`${columns[i].title} ${shown}`] });
    });
    points.slice(1).forEach((point, i) => {
      if (!point || !points[i]) return;
      for (const share of [0.2, 0.4, 0.6, 0.8]) {
        const between = (axis) => points[i][axis] + share * (point[axis] - points[i][axis]);
        hits.push({ x: between(0), y: between(1), trial, lines: page.settings(trial) });
      }
    });
  }
  const labels = new Labels(width);
  columns.forEach((column, index) => drawAxis(svg, labels, column, index, { top, bottom }, page));
  page.hover(svg, hits);
}

/** A path that leaves out what a trial does not have (a score, say). */
function broken(points) {
  let path = "";
  points.forEach((point, i) => {
    if (!point) return;
    const joined = i > 0 && points[i - 1];
    if (joined || points[i + 1]) path += `${joined ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
  });
  return path;
}

function drawAxis(svg, labels, column, index, { top, bottom }, page) {
  const { x } = column;
  const axis = draw(svg, "g", { class: "parameter-axis" });
  draw(axis, "line", { class: "axis", x1: x, x2: x, y1: top, y2: bottom });
  const [above, name] = headers(column);
  if (above) labels.add(axis, { x, y: 14, "text-anchor": "middle", text: above });
  labels.add(axis, { class: "title", x, y: 30, "text-anchor": "middle", text: name });
  const { ticks } = column.scale;
  const texts = tickTexts(column);
  for (const at of ticks.map(column.scale.place)) {
    draw(axis, "line", { class: "axis y-tick", x1: x - 4, x2: x + 4, y1: at, y2: at });
  }
  for (const tick of byWeight(column.scale)) {
    labels.add(axis, { class: "base-label", x: x + 8, y: column.scale.place(ticks[tick]) + 4, text: texts[tick] });
  }
  if (column.none) labels.add(axis, { class: "base-label", x: x + 8, y: column.none + 4, text: `${NOT_USED} not used` });
  brush(axis, column, index, { top, bottom }, page);
}

function clipped(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

/** Dragging keeps the trials whose value lies in the stretch; a click lets go. */
function brush(axis, column, index, { top, bottom }, page) {
  const picked = draw(axis, "rect", { class: "picked", x: column.x - 9, width: 18, y: 0, height: 0 });
  const area = draw(axis, "rect", { class: "brush", x: column.x - 16, width: 32, y: top - 10, height: bottom - top + 20 });
  const level = (event) => {
    const frame = axis.ownerSVGElement.getBoundingClientRect();
    const inner = ((event.clientY - frame.top) * axis.ownerSVGElement.viewBox.baseVal.height) / frame.height;
    return Math.min(bottom + 8, Math.max(top - 8, inner));
  };
  const mark = (stretch) => {
    picked.setAttribute("y", stretch ? stretch[0] : 0);
    picked.setAttribute("height", stretch ? stretch[1] - stretch[0] : 0);
  };
  let start = null;
  area.addEventListener("pointerdown", (event) => {
    start = level(event);
    area.setPointerCapture(event.pointerId);
  });
  area.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const end = level(event);
    mark([Math.min(start, end), Math.max(start, end)]);
  });
  area.addEventListener("pointerup", (event) => {
    if (start === null) return;
    const stretch = [Math.min(start, level(event)), Math.max(start, level(event))];
    start = null;
    const kept = stretch[1] - stretch[0] > 3 ? stretch : null;
    mark(kept);
    page.pick(index, kept && { stretch: kept, values: column.values, place: column.scale.place });
  });
  area.addEventListener("pointercancel", () => { start = null; });
  mark(page.picks.get(index)?.stretch);
}
