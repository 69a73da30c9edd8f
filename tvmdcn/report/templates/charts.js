// SPDX-License-Identifier: Apache-2.0
// Draws every chart of the page from the JSON beside it, and gives it a table of its numbers on request.
// Colours are CSS variables, so nothing is drawn again for a dark page or for print.
const config = {
  background: null,
  font: getComputedStyle(document.body).fontFamily,
  view: {stroke: null},
  axis: {
    labelColor: "var(--ink)", titleColor: "var(--faint)", gridColor: "var(--grid)", domainColor: "var(--grid)",
    tickColor: "var(--grid)", labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 10,
    labelLimit: 260,
  },
  header: {labelColor: "var(--ink)", titleColor: "var(--faint)", labelFontSize: 12, titleFontSize: 12},
  legend: {
    labelColor: "var(--ink)", titleColor: "var(--faint)", labelFontSize: 12, titleFontSize: 12, labelLimit: 300,
    titleFontWeight: "normal", orient: "top", symbolStrokeWidth: 2,
  },
  title: {color: "var(--ink)", subtitleColor: "var(--faint)", fontSize: 13, anchor: "start"},
  text: {color: "var(--ink)", fontSize: 11},
  rule: {color: "var(--faint)"},
  mark: {color: "var(--ours)"},
};

// Rows of all data within a specification that have more than one number to show.
function values(spec) {
  if (spec === null || typeof spec !== "object") return [];
  const own = Array.isArray(spec.data?.values) ? [spec.data.values] : [];
  const parts = ["layer", "hconcat", "vconcat", "concat"].flatMap((name) => spec[name] ?? []);
  const found = [...own, ...Object.values(spec.datasets ?? {}), ...[...parts, spec.spec].flatMap(values)];
  return found.filter((rows) => rows.length > 0 && Object.keys(rows[0]).length > 1);
}

function table(rows) {
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const element = document.createElement("table");
  const line = (parent, tag, cells) => {
    const tr = parent.insertRow();
    for (const cell of cells) {
      const item = tr.appendChild(document.createElement(tag));
      const number = typeof cell === "number" && !Number.isInteger(cell);
      item.textContent = cell == null ? "" : number ? String(Number(cell.toPrecision(6))) : String(cell);
      if (typeof cell !== "number") item.className = "name";
    }
  };
  line(element.createTHead(), "th", columns.map((name) => name.replaceAll("_", " ")));
  const body = element.createTBody();
  for (const row of rows) line(body, "td", columns.map((name) => row[name]));
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.append(element);
  return scroll;
}

async function draw(figure) {
  const spec = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const details = figure.querySelector("details.values");
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(...values(spec).map(table));
  });
  await vegaEmbed(figure.querySelector(".plot"), {...spec, config}, {
    actions: false, ast: true, mode: "vega-lite", renderer: "svg", tooltip: {theme: "custom", disableDefaultStyle: true},
  });
  figure.dataset.drawn = "true";
}

function fail(figure, error) {
  figure.querySelector(".plot").textContent = `This figure could not be drawn: ${error.message}`;
  console.error(error);
}

// A chart needs a width to be drawn in: one that is hidden waits until it is shown, by unfolding or by a script.
const isShown = (figure) => figure.offsetWidth > 0 && figure.closest("details:not([open])") === null;
const waiting = new Set(document.querySelectorAll("figure.chart"));

function drawShown() {
  const due = [...waiting].filter(isShown);
  for (const figure of due) waiting.delete(figure);
  return Promise.all(due.map((figure) => draw(figure).catch((error) => fail(figure, error))));
}

document.addEventListener("toggle", drawShown, true);
const resized = new ResizeObserver(drawShown);
for (const figure of waiting) resized.observe(figure);
drawShown().then(() => { document.documentElement.dataset.charts = "drawn"; });
