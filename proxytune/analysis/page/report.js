// The generations of a report: ten at a time, each steered token with what the three models thought of it.

const PAGE = 10;
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const WIDTH = 10; // numbers of a token: see `_token` in analysis/generations.py
let page = 0;
let shown = data.rows;
let current = null; // the token that is told

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function percent(thousandths) {
  if (thousandths === 0) return "<0.1%";
  return `${(thousandths / 10).toFixed(1)}%`;
}

function token(row, i) {
  const [word, base, expert, anti, steered, baseRank, steeredRank, instead, insteadShare, changed] =
    row.tokens.slice(i * WIDTH, (i + 1) * WIDTH);
  return {
    text: data.words[word], base, expert, anti, steered, baseRank, steeredRank,
    instead: data.words[instead], insteadShare, changed: changed === 1,
  };
}

function spelled(text) {
  return text === "" ? "(part of a character)" : text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

// One reply whose tokens can be looked at with the mouse, by touch, and with the arrow keys

function colour(span, told) {
  const by = $("by").value;
  const value = by === "gain" ? (told.steered - told.base) / 1000 : by === "tuning" ? (told.expert - told.anti) / 1000
    : 1 - told.base / 1000;
  const side = value >= 0 ? "--up" : "--down";
  span.style.backgroundColor = `color-mix(in srgb, var(${side}) ${Math.round(Math.abs(value) * 55)}%, transparent)`;
}

function heated(row) {
  const box = make("div", { className: "reply", tabIndex: 0 });
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "steered reply; left and right arrow keys go through its tokens");
  const spans = [];
  for (let i = 0; i < row.tokens.length / WIDTH; i++) {
    const told = token(row, i);
    const span = make("span", { textContent: told.text, className: told.changed ? "changed" : "" });
    colour(span, told);
    span.addEventListener("mouseenter", () => tell(span, told));
    span.addEventListener("click", () => tell(span, told));
    spans.push(span);
  }
  let at = -1;
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") return hide();
    if (event.key === "Home") at = 0;
    else if (event.key === "End") at = spans.length - 1;
    else if (step) at = Math.min(spans.length - 1, Math.max(0, at + step));
    else return;
    event.preventDefault();
    tell(spans[at], token(row, at));
  });
  box.append(...spans);
  return box;
}

function tell(span, told) {
  if (current) current.classList.remove("told");
  current = span;
  span.classList.add("told");
  const rows = [["base", told.base, told.baseRank], ["expert", told.expert], ["anti", told.anti],
    ["steered", told.steered, told.steeredRank]].map(([name, share, rank]) => {
    const bar = make("span", { className: "bar" }, make("i"));
    bar.firstChild.style.width = `${share / 10}%`;
    bar.setAttribute("aria-hidden", "true");
    const row = make("tr", { className: name }, make("th", { scope: "row", textContent: name }),
      make("td", {}, bar), make("td", { textContent: percent(share) }),
      make("td", { textContent: rank ? `rank ${rank}` : "" }));
    return row;
  });
  const instead = told.changed ? `The base would have said ${spelled(told.instead)}` : "The base's likeliest is the same";
  $("told").replaceChildren(
    make("strong", {}, make("code", { textContent: spelled(told.text) })),
    ` ${instead} (${percent(told.insteadShare)}). `,
    make("table", {}, make("tbody", {}, ...rows)),
  );
  $("told").hidden = false;
}

function hide() {
  if (current) current.classList.remove("told");
  current = null;
  $("told").hidden = true;
}

// A prompt with what every system wrote

function article(row) {
  const replies = make("div", { className: "replies" });
  for (const system of data.systems) {
    if (row.texts[system.key] === undefined) continue;
    const scores = row.scores[system.key] ?? {};
    const told = Object.entries(scores).map(([name, value]) => `${name} ${+value.toFixed(3)}`).join(", ");
    const text = system.key === data.heated && row.tokens
      ? heated(row) : make("div", { className: "reply", textContent: row.texts[system.key], tabIndex: 0 });
    if (!row.tokens || system.key !== data.heated) {
      text.setAttribute("role", "group");
      text.setAttribute("aria-label", `${system.name} reply`);
    }
    replies.append(make("section", { className: system.key },
      make("h4", {}, system.name, make("span", { className: "score", textContent: told ? ` · ${told}` : "" })), text));
  }
  const prompt = make("details", { open: true }, make("summary", { textContent: "prompt" }),
    make("pre", { textContent: row.prompt }));
  const parts = [make("h3", { textContent: row.id }), prompt, replies];
  if (row.reference) {
    parts.push(make("details", {}, make("summary", { textContent: "reference" }),
      make("pre", { textContent: row.reference })));
  }
  return make("article", {}, ...parts);
}

function score(row, system) {
  const values = Object.values(row.scores[system] ?? {});
  return values.length ? values[0] * data.better : 0;
}

const FILTERS = {
  all: () => true,
  better: (row) => score(row, data.heated) > score(row, "base"),
  worse: (row) => score(row, data.heated) < score(row, "base"),
};

function choose() {
  const asked = $("search").value.toLowerCase();
  const keep = FILTERS[$("filter").value];
  shown = data.rows.filter((row) => keep(row)
    && (!asked || [row.id, row.prompt, ...Object.values(row.texts)].some((text) => text.toLowerCase().includes(asked))));
  page = 0;
  draw();
}

function draw() {
  hide();
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  $("replies").replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(article));
  $("place").textContent = `${shown.length} of ${data.rows.length} prompts, page ${page + 1} of ${pages}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page === pages - 1;
}

if (data.rows.length) {
  $("search").addEventListener("input", choose);
  $("filter").addEventListener("change", choose);
  $("by").addEventListener("change", draw);
  $("previous").addEventListener("click", () => { page -= 1; draw(); });
  $("next").addEventListener("click", () => { page += 1; draw(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  draw();
}
