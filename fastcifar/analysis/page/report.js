// What the report does beyond being read: pictures out of the sheet, charts, cells that show their images, filters.

const data = JSON.parse(document.getElementById("data").textContent);
const sheet = document.getElementById("sheet");

/** Draw a tile of the sheet into a canvas of a tile's own size; the page enlarges it, smoothly. */
function paint(canvas) {
  const number = Number(canvas.dataset.tile), side = data.tile;
  canvas.width = canvas.height = side;
  canvas.getContext("2d").drawImage(sheet, (number % data.columns) * side, Math.floor(number / data.columns) * side, side, side, 0, 0, side, side);
  canvas.classList.add("painted");
}
const paintAll = (root) => root.querySelectorAll("canvas[data-tile]:not(.painted)").forEach(paint);

const percent = (share) => `${(100 * share).toFixed(1)}%`;

/** Return a figure with one image and what the model says of it; see `HardImage` for the fields. */
function figure(parent, classes, [tile, row, label, predicted, loss, probability, labelProbability]) {
  const figure = make(parent, "figure");
  if (tile !== null) make(figure, "canvas", { "data-tile": tile, role: "img", "aria-label": `image ${row}, labelled ${classes[label]}` });
  const caption = make(figure, "figcaption");
  make(caption, "span", { class: "given" }, classes[label]);
  caption.append(` ${percent(labelProbability)}`);
  make(caption, "br");
  make(caption, "span", { class: label === predicted ? "guess same" : "guess" }, classes[predicted]);
  caption.append(` ${percent(probability)}`);
  make(caption, "br");
  caption.append(`no. ${row}, loss ${loss.toFixed(2)}`);
}

/** Let a click on a cell of the confusion matrix show its images below, a second click hide them. */
function cells(section, run) {
  const shown = section.querySelector(".shown");
  section.querySelectorAll("button.cell").forEach((cell) =>
    cell.addEventListener("click", () => {
      const open = cell.getAttribute("aria-expanded") === "true";
      section.querySelectorAll("button.cell").forEach((c) => c.setAttribute("aria-expanded", "false"));
      shown.replaceChildren();
      if (open) return;
      cell.setAttribute("aria-expanded", "true");
      const images = run.cells[cell.dataset.cell] || [], [given, predicted] = cell.dataset.cell.split(",").map(Number);
      const count = Number(cell.textContent), all = count > images.length ? `, the ${images.length} of highest loss` : "";
      make(shown, "h3", {}, `${run.classes[given]} called ${run.classes[predicted]}: ${count} ${count === 1 ? "image" : "images"}${all}`);
      const grid = make(shown, "div", { class: "images" });
      images.forEach((image) => figure(grid, run.classes, image));
      paintAll(shown);
    }),
  );
}

/** Show the hardest images of all classes, or of the one that is chosen. */
function filter(section, run) {
  const select = section.querySelector("select.filter"), grid = section.querySelector(".images.hard");
  if (!select) return;
  const show = () => {
    grid.replaceChildren();
    const images = select.value === "" ? run.hard : run.hardByClass.filter((image) => image[2] === Number(select.value));
    images.forEach((image) => figure(grid, run.classes, image));
    paintAll(grid);
  };
  select.addEventListener("change", show);
  show();
}

function runCharts(section, run) {
  const c = run.curves;
  if (!c) return;
  const [loss, accuracy, rate] = section.querySelectorAll(".chart.run-curve");
  const x = { label: "epoch", whole: true };
  chart(loss, { title: "Loss, nats", x, y: { label: "nats" }, series: c.loss, legend: true });
  chart(accuracy, { title: "Accuracy, %", x, y: { label: "%" }, series: c.accuracy, legend: true });
  chart(rate, { title: "Learning rate", x, y: { label: "", low: 0 }, series: c.lr });
}

function reliabilityChart(section, run) {
  const root = section.querySelector(".chart.reliability");
  if (!root) return;
  const diagonal = { name: "perfect", colour: "--muted", x: [0, 100], y: [0, 100], dashed: true };
  chart(root, {
    title: "Right, % of images, by confidence, %", nearest: "point", fixed: true, height: 20,
    x: { label: "% confidence" }, y: { label: "% right", low: 0, high: 100 }, series: [diagonal, ...run.reliability],
  });
}

function comparisonCharts(c) {
  const names = c.groups.map((g) => g.label), colour = (i) => `--c${i % 8}`;
  const charts = document.querySelectorAll(".chart.compared"), clock = document.getElementById("clock");
  const series = (key, x) => c.curves.map((g, i) => ({ name: names[i], colour: colour(i), x: x === "epoch" ? g.epochs : g.minutes, y: g[key].mean, low: g[key].low, high: g[key].high })).filter((s) => s.y.some((v) => v !== null));
  const draw = () => {
    const by = clock.value, x = by === "epoch" ? { label: "epoch", whole: true } : { label: "minutes of training" };
    charts.forEach((root) => root.replaceChildren());
    chart(charts[0], { title: "Test accuracy, %", x, y: { label: "%" }, series: series("test_accuracy", by), height: 19, nearest: by === "epoch" ? "x" : "point" });
    chart(charts[1], { title: "Test loss, nats", x, y: { label: "nats" }, series: series("test_loss", by), nearest: by === "epoch" ? "x" : "point" });
    chart(charts[2], { title: "Training loss, nats", x, y: { label: "nats" }, series: series("train_loss", by), nearest: by === "epoch" ? "x" : "point" });
  };
  clock.addEventListener("change", draw);
  draw();
  timeChart(c, colour);
}

/** Accuracy against wall-clock. The published runs have no clock: they are lines across, those of these recipes bold. */
function timeChart(c, colour) {
  const points = c.time.filter((t) => t.accuracy !== null && t.minutes > 0);
  if (!points.length) return;
  const ours = c.groups.map((g, i) => ({ g, i, at: points.filter((t) => t.group === i) })).filter(({ at }) => at.length)
    .map(({ g, i, at }) => ({ name: g.label, colour: colour(i), line: false, marks: true, x: at.map((t) => t.minutes), y: at.map((t) => t.accuracy), labels: at.map((t) => t.hardware ? `${t.name}, ${t.hardware}` : t.name) }));
  const minutes = points.map((t) => t.minutes), ends = [Math.min(...minutes) / 2, Math.max(...minutes) * 2];
  const low = Math.min(...points.map((t) => t.accuracy), ...c.groups.filter((g) => g.published).map((g) => g.published)) - 3;
  const rows = c.published.filter((p) => p.accuracy >= low).map((p) => ({ name: p.name, colour: "--muted", quiet: true, line: false, marks: true, thin: true, x: [ends[1]], y: [p.accuracy], labels: [`${p.name}, published`] }));
  const own = c.groups.map((g, i) => ({ g, i })).filter(({ g }) => g.published)
    .map(({ g, i }) => ({ i, y: g.published, name: `${g.label}, published${g.recipe_differs?.length ? " for another recipe" : ""}` }))
    .map(({ i, y, name }) => ({ name, colour: colour(i), dashed: true, x: ends, y: [y, y], labels: Array(2).fill(name) }));
  chart(document.querySelector(".chart.time"), {
    title: "Best test accuracy, %, against wall-clock", nearest: "point", height: 21, legend: true,
    x: { label: "minutes in all", log: true }, y: { label: "%" }, series: [...own, ...rows, ...ours],
  });
}

/** Show one run at a time. */
function tabs() {
  const buttons = [...document.querySelectorAll(".tabs button")], sections = [...document.querySelectorAll("section.run")];
  const show = (chosen) => {
    buttons.forEach((b, i) => b.setAttribute("aria-selected", String(i === chosen)));
    sections.forEach((s, i) => { s.hidden = i !== chosen; });
    paintAll(sections[chosen]);
  };
  buttons.forEach((b, i) => b.addEventListener("click", () => show(i)));
  if (buttons.length) show(0);
}

async function begin() {
  if (sheet) await sheet.decode();
  document.querySelectorAll("section.run").forEach((section, i) => {
    const run = data.runs[i];
    cells(section, run);
    filter(section, run);
    runCharts(section, run);
    reliabilityChart(section, run);
  });
  if (data.comparison) comparisonCharts(data.comparison);
  tabs();
  paintAll(document);
  document.documentElement.dataset.ready = "true";
}
begin();
