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

const compares = (report) => report.methods.length > 1;

/** Trials to colour, best first: the best of each method, or, of one method, the best of all. */
function coloured(report) {
  const drawn = (t) => t.evalLoss.length || t.loss.length;
  const rest = report.trials.filter((t) => t.metric === null);
  const best = report.trials.filter((t) => t.best);
  const all = [...new Set([...best, ...ranked(report), ...rest])].filter(drawn);
  if (!compares(report)) return all.slice(0, COLOURED);
  return report.methods.map(({ look }) => all.find((t) => t.look === look)).filter(Boolean)
    .sort((a, b) => all.indexOf(a) - all.indexOf(b));
}

/** Which of the ten colours and marks each coloured trial has. */
function looks(report) {
  return new Map(coloured(report).map((trial, place) => [trial, compares(report) ? trial.look : place]));
}

/**
 * The axis of losses with the base model's line, or without it: where it lies so far off that it
 * would flatten the trials, the axis is logarithmic, or leaves it out if that does not help either.
 */
function lossScale(low, high, base, from, to) {
  const share = (bend) => (bend(high) - bend(low)) / (bend(Math.max(high, base)) - bend(Math.min(low, base)));
  const fits = (value) => value >= 1 / 4;
  const ends = (values) => [Math.min(...values), Math.max(...values)];
  const [least, most] = ends(base === null ? [low, high] : [low, high, base]);
  const flat = base !== null && low < high && !fits(share((v) => v));
  const log = flat && least > 0 && (fits(share(Math.log)) || share(Math.log) > 2 * share((v) => v));
  if (log && share(Math.log) > 0.15) {
    const margin = (most / least) ** 0.04;
    return { ...scale("log", least / margin, most * margin, from, to), base: true };
  }
  if (flat) return { ...scale("linear", ...padded({ low, high }, 0.04), from, to, 6), base: false };
  return { ...scale("linear", ...padded({ low: least, high: most }, 0.04), from, to, 6), base: base !== null };
}

function drawLoss(figure, report, page) {
  const plot = figure.querySelector(".plot");
  const drawn = report.trials.filter((t) => t.evalLoss.length || t.loss.length);
  if (!drawn.length) return nothing(plot, "No trial recorded a loss.");
  const evaluations = drawn.flatMap((t) => t.evalLoss.map((p) => p[1]));
  // Where nothing was evaluated yet, training loss is all there is to see.
  const withTraining = page.training || !evaluations.length;
  const training = withTraining ? drawn.flatMap((t) => t.loss.map((p) => p[1])) : [];
  const range = extent([...evaluations, ...training]);
  // Training starts at the base model's loss: how far the evaluations lie from it decides the axis.
  const seen = evaluations.length ? extent(evaluations) : range;
  const last = Math.max(...drawn.flatMap((t) => [...t.evalLoss, ...t.loss].map((p) => p[0])));
  const best = report.trials.find((t) => t.best && t.evalLoss.length);
  const { svg, width, height } = canvas(plot, 380, "Loss curves of all trials", [
    `Loss by optimizer step of ${drawn.length} trials.`,
    best && `That of the best, #${best.number}, ends at ${show(best.evalLoss[best.evalLoss.length - 1][1])}.`,
    report.baseLoss !== null && `The base model's is ${show(report.baseLoss)}.`,
  ]);
  const [top, bottom] = [36, height - 42];
  const chosen = lossScale(seen.low, seen.high, report.baseLoss, bottom, top);
  const within = (v) => (chosen.kind === "log" ? v > 0 : true);
  const all = [range.low, range.high, ...(chosen.base ? [report.baseLoss] : [])].filter(within);
  const [low, high] = [Math.min(chosen.low, ...all), Math.max(chosen.high, ...(chosen.base || report.baseLoss === null ? all : []))];
  const y = scale(chosen.kind, low, high, bottom, top, 6);
  const beyond = range.cut || range.high > high * 1.000001;
  const box = { left: roomFor(y.ticks), right: width - 12, top, bottom };
  const x = scale("linear", 0, last, box.left, box.right, width / 90);
  const labels = new Labels(width);
  const [evalTitle, rest] = [withTraining ? "Loss" : "Eval loss", beyond ? " (some values lie beyond the axis)" : ""];
  axes(svg, labels, x, y, box, "Optimizer step", evalTitle + rest);
  const clip = draw(draw(svg, "clipPath", { id: "loss-clip" }), "rect", {
    x: box.left, y: box.top - 4, width: box.right - box.left + 6, height: box.bottom - box.top + 4,
  });
  const marks = draw(svg, "g", { "clip-path": `url(#${clip.parentElement.id})` });
  const at = ([step, value]) => [x.place(step), y.kind === "log" && value <= 0 ? box.bottom : y.place(value)];
  const look = looks(report);
  const classes = (trial) => (look.has(trial) ? `c${look.get(trial)}` : "other");
  const order = [...look.keys()];
  const place = (trial) => (look.has(trial) ? order.indexOf(trial) : order.length);
  const hits = [];
  // The best are drawn last, to lie on top.
  for (const trial of [...drawn].sort((a, b) => place(b) - place(a))) {
    const group = series(marks, trial, classes(trial));
    if (withTraining && trial.loss.length) draw(group, "path", { class: "loss-line", d: line(trial.loss.map(at)) });
    if (trial.evalLoss.length) draw(group, "path", { class: "eval-line", d: line(trial.evalLoss.map(at)) });
    for (const point of trial.evalLoss) {
      const [cx, cy] = at(point);
      if (look.has(trial)) drawMark(group, report, look.get(trial), cx, cy, 4, "eval-point");
      else draw(group, "circle", { class: "eval-point", cx, cy, r: 1.5 });
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
  for (const trial of drawn) endMark(series(marks, trial, classes(trial)), trial, at);
  if (report.baseLoss !== null) {
    const text = `base model ${show(report.baseLoss)}`;
    const label = { class: "base-label", x: box.right, "text-anchor": "end" };
    if (chosen.base) {
      const level = y.place(report.baseLoss);
      draw(svg, "line", { class: "base", x1: box.left, x2: box.right, y1: level, y2: level });
      labels.add(svg, { ...label, text }, [{ y: level - 6 }, { y: level + 15 }]);
    } else {
      const above = report.baseLoss > high;
      labels.add(svg, { ...label, text: `${text}, ${above ? "above ↑" : "below ↓"}` }, above
        ? [{ y: box.top - 4 }, { y: box.top + 12 }] : [{ y: box.bottom - 6 }]);
    }
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
  const front = paretoFront(points, report.metric.mode);
  const { svg, width, height } = canvas(plot, 340, `${report.metric.label} against ${cost.label.toLowerCase()}`, [
    `A point each for ${points.length} trials.`,
    front.length && `No other beats ${front.slice(0, 9).map(({ trial, cost: value }) =>
      `#${trial.number} (${withUnit(trial.metric, report.metric.unit)} at ${withUnit(value, cost.unit)})`).join(", ")}.`,
  ]);
  const [top, bottom] = [36, height - 42];
  const costs = points.map((p) => p.cost);
  const [least, most] = [Math.min(...costs), Math.max(...costs)];
  const log = least > 0 && most / least > 20;
  const [from, to] = log ? [least / 1.3, most * 1.3] : padded({ low: least, high: most }, 0.06);
  const range = extent(points.map((p) => p.trial.metric));
  const y = scale("linear", ...padded(range, 0.08), bottom, top, 5);
  const box = { left: roomFor(y.ticks), right: width - 20, top, bottom };
  const x = scale(log ? "log" : "linear", from, to, box.left, box.right, width / 110);
  const labels = new Labels(width);
  axes(svg, labels, x, y, box, titled(cost), titled(report.metric) + (range.cut ? ", some values lie beyond the axis" : ""));
  const pin = (value) => Math.min(box.bottom, Math.max(box.top, y.place(value)));
  for (const point of points) [point.x, point.y] = [x.place(point.cost), pin(point.trial.metric)];

  // Steps, not slopes: nothing was measured between two trials.
  const steps = front.flatMap((p, i) => (i ? [[p.x, front[i - 1].y], [p.x, p.y]] : [[p.x, p.y]]));
  draw(svg, "path", { class: "front", d: line(steps) });
  const hits = [];
  const size = points.length > 60 ? 4 : 5.5;
  for (const { trial, cost: value, x: cx, y: cy } of points) {
    const look = compares(report) ? trial.look : null;
    const group = series(svg, trial, look === null ? "cost-mark plain" : `cost-mark c${look}`);
    if (trial.best) draw(group, "circle", { class: "ring", cx, cy, r: 9 });
    drawMark(group, report, look ?? 0, cx, cy, size, "dot");
    labels.take({ x: cx - size, y: cy - size, width: 2 * size, height: 2 * size });
    hits.push({
      x: cx, y: cy, trial,
      lines: [`${report.metric.label.toLowerCase()} ${withUnit(trial.metric, report.metric.unit)}`,
        `${cost.label.toLowerCase()} ${withUnit(value, cost.unit)}`],
    });
  }
  // The best trial's number first; those that find no room are told by the pointer.
  for (const point of [...front].sort((a, b) => b.trial.best - a.trial.best)) {
    labels.add(svg, { class: "tag", text: `#${point.trial.number}` }, around(point.x, point.y, point.trial.best ? 12 : 9), 0);
  }
  page.hover(svg, hits);
}
