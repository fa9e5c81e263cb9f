// Loss curves, and quality against cost.

const COLOURED = 8;

/** Trials with a score, best first. */
function ranked(report) {
  const sign = report.metric.mode === "min" ? 1 : -1;
  return report.trials.filter((t) => t.metric !== null).sort((a, b) => sign * (a.metric - b.metric));
}

/** A group that highlighting and filtering find by its trial. */
function series(parent, trial, classes) {
  const best = trial.best ? "best" : "";
  return draw(parent, "g", { class: `series ${trial.status} ${best} ${classes}`, "data-trial": trial.number });
}

/** Trials to colour, best first: one hue each, no more than can be told apart. */
function coloured(report) {
  const drawn = (t) => t.evalLoss.length || t.loss.length;
  const scored = ranked(report);
  const rest = report.trials.filter((t) => t.metric === null);
  const best = report.trials.filter((t) => t.best);
  return [...new Set([...best, ...scored, ...rest])].filter(drawn).slice(0, COLOURED);
}

function drawLoss(figure, report, page) {
  const plot = figure.querySelector(".plot");
  const drawn = report.trials.filter((t) => t.evalLoss.length || t.loss.length);
  if (!drawn.length) return nothing(plot, "No trial recorded a loss.");
  const evaluations = drawn.flatMap((t) => t.evalLoss.map((p) => p[1]));
  // Where nothing was evaluated yet, training loss is all there is to see.
  const withTraining = page.training || !evaluations.length;
  const training = withTraining ? drawn.flatMap((t) => t.loss.map((p) => p[1])) : [];
  const base = report.baseLoss === null ? [] : [report.baseLoss];
  const range = extent([...evaluations, ...training]);
  const [low, high] = padded(extent([range.low, range.high, ...base].filter(Number.isFinite)), 0.04);
  const last = Math.max(...drawn.flatMap((t) => [...t.evalLoss, ...t.loss].map((p) => p[0])));
  const { svg, width, height } = canvas(plot, 380, "Loss curves of all trials",
    `Loss by optimizer step of ${drawn.length} trials.`);
  const box = { left: 48, right: width - 12, top: 34, bottom: height - 42 };
  const x = scale("linear", 0, last, box.left, box.right, width / 90);
  const y = scale("linear", low, high, box.bottom, box.top, 6);
  axes(svg, x, y, box, "Optimizer step", range.cut ? "Loss (some values lie beyond the axis)" : "Loss");
  const clip = draw(draw(svg, "clipPath", { id: "loss-clip" }), "rect", {
    x: box.left, y: box.top - 4, width: box.right - box.left + 6, height: box.bottom - box.top + 4,
  });
  const marks = draw(svg, "g", { "clip-path": `url(#${clip.parentElement.id})` });
  const at = ([step, value]) => [x.place(step), y.place(value)];
  const colours = coloured(report);
  const hits = [];
  // The best are drawn last, to lie on top.
  for (const trial of [...drawn].sort((a, b) => place(b) - place(a))) {
    const colour = colours.indexOf(trial);
    const group = series(marks, trial, colour < 0 ? "other" : `c${colour}`);
    if (withTraining && trial.loss.length) draw(group, "path", { class: "loss-line", d: line(trial.loss.map(at)) });
    if (trial.evalLoss.length) draw(group, "path", { class: "eval-line", d: line(trial.evalLoss.map(at)) });
    for (const point of trial.evalLoss) {
      const [cx, cy] = at(point);
      draw(group, "circle", { class: "eval-point", cx, cy, r: colour < 0 ? 1.5 : 3.5 });
      hits.push({ x: cx, y: cy, trial, lines: [`step ${point[0]}`, `eval loss ${show(point[1])}`] });
    }
    if (withTraining) {
      for (const point of trial.loss) {
        const [px, py] = at(point);
        hits.push({ x: px, y: py, trial, lines: [`step ${point[0]}`, `training loss ${show(point[1])}`] });
      }
    }
  }
  // Ends lie above all lines, or the best would hide why others are short.
  for (const trial of drawn) {
    const colour = colours.indexOf(trial);
    endMark(series(marks, trial, colour < 0 ? "other" : `c${colour}`), trial, at);
  }
  function place(trial) {
    const index = colours.indexOf(trial);
    return index < 0 ? COLOURED : index;
  }
  if (base.length) {
    const level = y.place(base[0]);
    draw(svg, "line", { class: "base", x1: box.left, x2: box.right, y1: level, y2: level });
    draw(svg, "text", {
      class: "base-label", x: box.right, y: level - 6, "text-anchor": "end", text: `base model ${show(base[0])}`,
    });
  }
  page.hover(svg, hits);
}

/** How a curve that did not finish ends: a square for stopped early, a cross for failed. */
function endMark(group, trial, at) {
  const points = trial.evalLoss.length ? trial.evalLoss : trial.loss;
  if (["finished", "running", "interrupted"].includes(trial.status)) return;
  const [cx, cy] = at(points[points.length - 1]);
  if (trial.status === "stopped") draw(group, "rect", { class: "end", x: cx - 4, y: cy - 4, width: 8, height: 8 });
  else draw(group, "path", { class: "end", d: `M${cx - 5} ${cy - 5}l10 10m0 -10l-10 10` });
}

/** Finished trials that no other finished trial beats in both, cheapest first. */
function paretoFront(points, mode) {
  const sign = mode === "min" ? 1 : -1;
  const front = [];
  const finished = points.filter((p) => p.trial.status === "finished");
  for (const point of finished.sort((a, b) => a.cost - b.cost || sign * (a.trial.metric - b.trial.metric))) {
    const last = front[front.length - 1];
    if (!last || sign * (point.trial.metric - last.trial.metric) < 0) front.push(point);
  }
  return front;
}

function drawCost(figure, report, page) {
  const plot = figure.querySelector(".plot");
  const cost = report.costs[page.cost];
  const points = !cost ? [] : report.trials
    .map((trial, index) => ({ trial, cost: cost.values[index] }))
    .filter((point) => point.cost !== null && point.trial.metric !== null);
  if (!points.length) return nothing(plot, "No trial has both a score and a cost.");
  const { svg, width, height } = canvas(plot, 340, `${report.metric.label} against ${cost.label.toLowerCase()}`,
    `A point each for ${points.length} trials.`);
  const box = { left: 52, right: width - 20, top: 34, bottom: height - 42 };
  const costs = points.map((p) => p.cost);
  const [least, most] = [Math.min(...costs), Math.max(...costs)];
  const log = least > 0 && most / least > 20;
  const [from, to] = log ? [least / 1.3, most * 1.3] : padded({ low: least, high: most }, 0.06);
  const range = extent(points.map((p) => p.trial.metric));
  const x = scale(log ? "log" : "linear", from, to, box.left, box.right, width / 110);
  const y = scale("linear", ...padded(range, 0.08), box.bottom, box.top, 5);
  axes(svg, x, y, box, titled(cost), titled(report.metric) + (range.cut ? ", some values lie beyond the axis" : ""));
  const pin = (value) => Math.min(box.bottom, Math.max(box.top, y.place(value)));
  for (const point of points) [point.x, point.y] = [x.place(point.cost), pin(point.trial.metric)];

  const front = paretoFront(points, report.metric.mode);
  // Steps, not slopes: nothing was measured between two trials.
  const steps = front.flatMap((p, i) => (i ? [[p.x, front[i - 1].y], [p.x, p.y]] : [[p.x, p.y]]));
  draw(svg, "path", { class: "front", d: line(steps) });
  const hits = [];
  for (const { trial, cost: value, x: cx, y: cy } of points) {
    const group = series(svg, trial, "cost-mark");
    if (trial.best) draw(group, "circle", { class: "ring", cx, cy, r: 9 });
    draw(group, "circle", { class: "dot", cx, cy, r: points.length > 60 ? 4 : 5.5 });
    hits.push({
      x: cx, y: cy, trial,
      lines: [`${report.metric.label.toLowerCase()} ${withUnit(trial.metric, report.metric.unit)}`,
        `${cost.label.toLowerCase()} ${withUnit(value, cost.unit)}`],
    });
  }
  let previous = -Infinity;
  for (const point of front) {
    if (point.x - previous < 40) continue;
    previous = point.x;
    draw(svg, "text", { class: "tag", x: point.x - (point.trial.best ? 14 : 9), y: point.y + 4, "text-anchor": "end", text: `#${point.trial.number}` });
  }
  page.hover(svg, hits);
}
