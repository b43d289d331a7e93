"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { leaves, modes, paths, outcomes, cells, examples } = data;
  const WIDTH = 7, NUMBER = new Intl.NumberFormat("en-US");
  const byId = (id) => document.getElementById(id);
  const control = { measure: byId("measure"), mode: byId("mode"), path: byId("path"), cpl: byId("cpl") };
  const leafPlace = new Map(leaves.map((leaf, i) => [leaf[0], i]));
  const bySlot = new Map();
  leaves.forEach((leaf, i) => {
    if (!bySlot.has(leaf[1])) bySlot.set(leaf[1], []);
    bySlot.get(leaf[1]).push(i);
  });

  function make(tag, text, parent) {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  function options(select, names, label) {
    names.forEach((name, i) => {
      const option = make("option", label(name), select);
      option.value = String(i);
    });
  }
  const cpls = [];
  for (let at = 0; at < cells.length; at += WIDTH) if (!cpls.includes(cells[at + 2])) cpls.push(cells[at + 2]);
  cpls.sort();
  const cplName = (cpl) => (cpl < 0 ? "unknown" : String(cpl));
  const pathName = (path) => path || "flat memory";
  options(control.mode, modes, (name) => name || "unknown");
  options(control.path, paths, pathName);
  options(control.cpl, cpls, cplName);

  /* The sums of each leaf under the filters; `only` may be one leaf. */
  function matches(at, mode, path, cpl) {
    return (mode < 0 || cells[at + 1] === mode) && (path < 0 || cells[at + 4] === path)
      && (cpl === null || cells[at + 2] === cpl);
  }
  function filters() {
    const number = (select) => (select.value === "" ? -1 : Number(select.value));
    return [number(control.mode), number(control.path), control.cpl.value === "" ? null : cpls[Number(control.cpl.value)]];
  }
  function sums() {
    const chosen = filters();
    const found = leaves.map(() => null);
    for (let at = 0; at < cells.length; at += WIDTH) {
      if (!matches(at, ...chosen)) continue;
      const leaf = cells[at];
      if (found[leaf] === null) found[leaf] = { cases: 0, findings: 0, outcomes: new Set() };
      const sum = found[leaf];
      sum.cases += cells[at + 5];
      sum.findings += cells[at + 6];
      sum.outcomes.add(cells[at + 3]);
    }
    return found;
  }
  function measured(parts, measure) {
    let total = 0;
    const seen = new Set();
    for (const part of parts) {
      if (part === null) continue;
      if (measure === "cases" || measure === "findings") total += part[measure];
      else for (const outcome of part.outcomes) {
        if (outcomes[outcome][0] && (measure === "outcomes" || outcomes[outcome][1])) seen.add(outcome);
      }
    }
    return total || seen.size;
  }
  function short(n) {
    if (n < 10000) return String(n);
    if (n < 1e6) return `${(n / 1e3).toPrecision(3)}k`;
    return n < 1e9 ? `${(n / 1e6).toPrecision(3)}M` : `${(n / 1e9).toPrecision(3)}G`;
  }
  function level(n, most) {
    return n === 0 ? 0 : 1 + Math.min(4, Math.floor((5 * Math.log(n + 1)) / Math.log(most + 2)));
  }

  const slots = [...document.querySelectorAll("[data-code]")];
  const singles = [...document.querySelectorAll("[data-leaf]")];
  function paint() {
    const measure = control.measure.value, found = sums();
    const shown = [
      ...slots.map((button) => [button, bySlot.get(button.id) || [], button.dataset.code]),
      ...singles.map((button) => [button, [leafPlace.get(button.dataset.leaf)], button.dataset.leaf]),
    ].map(([button, parts, code]) => [button, measured(parts.map((i) => found[i]), measure), code]);
    const most = shown.reduce((a, [, n]) => Math.max(a, n), 0);
    for (const [button, n, code] of shown) {
      const todo = button.classList.contains("todo");
      button.className = button.className.replace(/ ?\bh\d\b/, "") + ` h${level(n, most)}`;
      button.querySelector(".n").textContent = n || todo ? short(n) : "–";
      const name = button.querySelector(".name").textContent;
      button.setAttribute("aria-label", `${code} ${name}: ${NUMBER.format(n)} ${control.measure.selectedOptions[0].text}`);
      button.title = button.getAttribute("aria-label");
      button.dataset.n = String(n);
    }
    const text = (select) => select.selectedOptions[0].text;
    byId("state").textContent = `${text(control.measure)}; mode ${text(control.mode)}, path ${text(control.path)}, `
      + `CPL ${text(control.cpl)}: ${NUMBER.format(measured(found, measure))}`;
    if (current) show(current.title, current.parts);
  }

  function table(parent, head, rows) {
    const box = make("div", undefined, parent);
    box.className = "scroll";
    const element = make("table", undefined, box);
    const line = make("tr", undefined, make("thead", undefined, element));
    head.forEach((text) => { make("th", text, line).scope = "col"; });
    const body = make("tbody", undefined, element);
    for (const row of rows) {
      const tr = make("tr", undefined, body);
      row.forEach((text) => make("td", text, tr));
    }
    return element;
  }
  const spaced = (hex) => (hex.match(/../g) || []).join(" ");

  let current = null;
  function show(title, parts) {
    current = { title, parts };
    const chosen = filters(), wanted = new Set(parts), box = byId("detail");
    box.replaceChildren();
    make("h2", title, box).id = "detail-title";
    for (const i of parts) {
      const [leaf, , mnemonic, what, why, absent] = leaves[i];
      const p = make("p", undefined, box);
      make("strong", leaf || "undecoded", p);
      p.append(` ${mnemonic}. ${what}.${why ? ` Never reached: ${why}.` : ""}`);
      if (absent.length && absent.length < modes.length) p.append(` Does not exist in ${absent.join(", ")}.`);
      if (parts.length > 12) break;
    }
    const rows = [];
    for (let at = 0; at < cells.length; at += WIDTH) {
      if (!wanted.has(cells[at]) || !matches(at, ...chosen)) continue;
      const [leaf, mode, cpl, outcome, path, n, findings] = cells.slice(at, at + WIDTH);
      const row = [modes[mode] || "unknown", cplName(cpl), outcomes[outcome][0] || "unknown", NUMBER.format(n), NUMBER.format(findings)];
      if (paths.length > 1 || paths[0]) row.splice(3, 0, pathName(paths[path]));
      if (parts.length > 1) row.unshift(leaves[leaf][0] || "undecoded");
      rows.push([n, row]);
    }
    rows.sort((a, b) => b[0] - a[0]);
    const head = ["mode", "CPL", "outcome", "cases", "in findings"];
    if (paths.length > 1 || paths[0]) head.splice(3, 0, "path");
    if (parts.length > 1) head.unshift("leaf");
    make("h3", `${NUMBER.format(rows.length)} cells`, box);
    if (rows.length) table(box, head, rows.slice(0, 200).map(([, row]) => row)).id = "detail-cells";
    if (rows.length > 200) make("p", `and ${NUMBER.format(rows.length - 200)} with fewer cases`, box);
    showExamples(box, wanted, chosen);
    showOracles(box, wanted);
  }
  function showExamples(box, wanted, [mode, path, cpl]) {
    const found = examples.filter((e) => wanted.has(e[0]) && (mode < 0 || e[1] === mode)
      && (path < 0 || e[4] === path) && (cpl === null || e[2] === cpl)).slice(0, 8);
    if (!found.length) return;
    make("h3", "Example cases", box);
    const rows = found.map(([leaf, m, c, o, p, where, code]) =>
      [where, spaced(code), `${modes[m]} CPL ${cplName(c)}${paths[p] ? ` ${paths[p]}` : ""}`, outcomes[o][0]]);
    table(box, ["case", "code", "state", "outcome"], rows).id = "detail-examples";
    if (data.campaign) {
      const p = make("p", "A case again: ", box);
      make("code", `emufuzz coverage CAMPAIGN --case ${found[0][5]} | emufuzz repro -`, p);
    }
  }
  function showOracles(box, wanted) {
    const rows = new Map();
    for (const [kind, list] of [["cases", data.verdicts], ["fields", data.fields]]) {
      for (const [oracle, leaf, why, n] of list) {
        if (!wanted.has(leaf)) continue;
        const key = `${oracle}\n${why}`;
        if (!rows.has(key)) rows.set(key, { oracle, why, cases: 0, fields: 0 });
        rows.get(key)[kind] += n;
      }
    }
    if (!rows.size) return;
    make("h3", "What the oracles say", box);
    const name = { "": "agrees; vouches for", finding: "objects" };
    const lines = [...rows.values()].map((r) => [r.oracle, r.why in name ? name[r.why] : r.why, NUMBER.format(r.cases), NUMBER.format(r.fields)]);
    table(box, ["oracle", "what, or why not", "cases", "fields in sample"], lines).id = "detail-oracles";
  }

  /* Choosing and moving. */
  function choose(button, title, parts) {
    document.querySelectorAll("[aria-current]").forEach((other) => other.removeAttribute("aria-current"));
    button.setAttribute("aria-current", "true");
    show(title, parts);
    if (matchMedia("(max-width: 74.99rem)").matches) byId("detail").focus();
  }
  slots.forEach((button) => button.addEventListener("click", () =>
    choose(button, `${button.dataset.code} ${button.querySelector(".name").textContent}`, bySlot.get(button.id) || [])));
  singles.forEach((button) => button.addEventListener("click", () =>
    choose(button, button.dataset.leaf, [leafPlace.get(button.dataset.leaf)])));
  for (const map of document.querySelectorAll(".map")) {
    const grid = [...map.querySelectorAll("button")];
    grid[0].tabIndex = 0;
    map.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 16, ArrowUp: -16 }[event.key];
      const at = grid.indexOf(document.activeElement);
      if (at < 0) return;
      let to = step === undefined ? -1 : at + step;
      if (event.key === "Home") to = at - (at % 16);
      if (event.key === "End") to = at - (at % 16) + 15;
      if (to < 0 || to > 255) return;
      event.preventDefault();
      grid[at].tabIndex = -1;
      grid[to].tabIndex = 0;
      grid[to].focus();
    });
    map.addEventListener("focusin", (event) => {
      grid.forEach((button) => { button.tabIndex = button === event.target ? 0 : -1; });
    });
  }

  /* The switches are kept in the address, so that a view can be passed on. */
  const shown = (select, option) => (select === control.measure ? option.value : option.text);
  function remember() {
    const parts = Object.entries(control).filter(([, select]) => select.value !== "" && select.value !== "cases")
      .map(([name, select]) => `${name}=${encodeURIComponent(shown(select, select.selectedOptions[0]))}`);
    history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : "#");
  }
  function recall() {
    for (const part of location.hash.slice(1).split("&")) {
      const [name, text] = part.split("=");
      if (!(name in control) || text === undefined) continue;
      const option = [...control[name].options].find((o) => shown(control[name], o) === decodeURIComponent(text));
      if (option) control[name].value = option.value;
    }
  }
  Object.values(control).forEach((select) => select.addEventListener("change", () => { paint(); remember(); }));
  recall();
  paint();
})();
