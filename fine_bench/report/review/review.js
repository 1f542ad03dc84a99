"use strict";
(() => {
  const PAGE = 50;
  const byId = (id) => document.getElementById(id);
  const content = JSON.parse(byId("content").textContent);
  const views = JSON.parse(byId("views").textContent);
  const { n, classes, digest } = content;
  const KINDS = ["accept", "reject", "relabel"];
  const WORDS = { accept: "label is right", reject: "remove", relabel: "relabel" };

  // ---- the table: entry i has rank order, columns are lists or one value for all
  const at = (name, i) => {
    const column = content.columns[name];
    if (column === undefined) return undefined;
    return Array.isArray(column) ? column[i] : column.all;
  };
  const nameOf = (i) => at("name", i) ?? String(at("row", i));
  const labelOf = (i) => classes[at("label", i)];
  const suggestedOf = (i) => (at("suggested", i) < 0 ? null : classes[at("suggested", i)]);
  const entryOf = new Map();
  for (let i = 0; i < n; i++) entryOf.set(at("row", i), i);
  const whole = (value) => value.toLocaleString("en");
  const number = (value, digits = 3) => {
    if (value === null || value === undefined) return "–";
    const text = Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-4)
      ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
    return text.replace("-", "−");
  };

  // ---- decisions: entry -> [kind, class or -1], kept in the browser under the data's digest
  const KEY = `fine_bench review ${digest}`;
  let decided = new Map();
  let elsewhere = [];  // kept decisions about rows of the same data that this page does not list
  const history = [];
  const said = byId("said");
  const warning = byId("warning");
  const warn = (text) => {
    warning.textContent = text;
    warning.hidden = text === "";
  };
  const fits = (one) => Array.isArray(one) && Number.isInteger(one[0]) && KINDS.includes(one[1])
    && Number.isInteger(one[2]) && one[2] < classes.length && (one[2] >= 0 || one[1] === "reject");
  const recall = () => {
    try {
      const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
      const kept = Array.isArray(found) ? found.filter(fits) : [];
      elsewhere = kept.filter(([row]) => !entryOf.has(row));
      decided = new Map(kept.filter(([row]) => entryOf.has(row))
        .map(([row, kind, label]) => [entryOf.get(row), [kind, label]]));
    } catch (error) {
      warn(`What this browser kept cannot be read (${error.message}). Load the saved csv.`);
    }
  };
  let waiting = 0;
  const keep = () => {
    clearTimeout(waiting);
    waiting = 0;
    const kept = Array.from(decided, ([i, [kind, label]]) => [at("row", i), kind, label]);
    try {
      localStorage.setItem(KEY, JSON.stringify([...elsewhere, ...kept]));
    } catch (error) {
      warn("This browser keeps no decisions for a file from the disk "
        + `(${error.name}). Save them before you close this page.`);
    }
  };
  const keepSoon = () => { if (!waiting) waiting = setTimeout(keep, 150); };
  const keepNow = () => { if (waiting) keep(); };
  window.addEventListener("pagehide", keepNow);
  document.addEventListener("visibilitychange", keepNow);
  window.addEventListener("storage", (event) => {  // another tab of the same page
    if (event.key === KEY && event.newValue !== null) { recall(); showPage(); }
  });

  const change = (pairs) => {
    history.push(pairs.map(([i]) => [i, decided.get(i)]));
    for (const [i, decision] of pairs) {
      if (decision) decided.set(i, decision); else decided.delete(i);
    }
    keepSoon();
  };
  const undo = () => {
    const step = history.pop();
    if (!step) { said.textContent = "nothing to undo"; return; }
    for (const [i, before] of step) {
      if (before) decided.set(i, before); else decided.delete(i);
    }
    keepSoon();
    const place = chosen.indexOf(step[0][0]);
    if (place >= 0) current = place;
    showPage(place >= 0);
    said.textContent = step.length === 1
      ? `undone: ${nameOf(step[0][0])}` : `undone: ${whole(step.length)} rows`;
  };
  const inWords = ([kind, label]) =>
    (kind === "relabel" ? `relabel to ${classes[label]}` : WORDS[kind]);

  // ---- filters
  const choices = { given: byId("given"), suggested: byId("suggested"), state: byId("state"),
    sort: byId("sort"), search: byId("search") };
  const option = (value, text) => {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    return made;
  };
  const fill = () => {
    const counts = { label: new Map(), suggested: new Map() };
    const pairs = new Map();
    const add = (map, key) => map.set(key, (map.get(key) ?? 0) + 1);
    for (let i = 0; i < n; i++) {
      const a = at("label", i);
      const b = at("suggested", i);
      add(counts.label, a);
      if (b < 0) continue;
      add(counts.suggested, b);
      if (a !== b) add(pairs, a * classes.length + b);
    }
    for (const [choice, column] of [["given", "label"], ["suggested", "suggested"]]) {
      choices[choice].append(option("", "all"));
      classes.forEach((name, k) => {
        const count = counts[column].get(k);
        if (count) choices[choice].append(option(k, `${name} (${whole(count)})`));
      });
    }
    for (const [value, text] of [["", "all"], ["none", "not decided"], ["any", "decided"],
      ...KINDS.map((kind) => [kind, WORDS[kind]])]) choices.state.append(option(value, text));
    const { repeats } = content.columns;
    const knowsRepeats = repeats !== undefined && repeats.all !== null;
    const orders = [["rank", "most suspicious first"], ["mu", "μ, largest first"],
      ["p_label", "least probable label first"], ["runs_found", "found in most runs first"],
      ...(knowsRepeats ? [["repeats", "likeliest to repeat first"]] : []),
      ["row", "as in the data"]];
    for (const [value, text] of orders) choices.sort.append(option(value, text));
    const frequent = Array.from(pairs).sort((a, b) => b[1] - a[1]).slice(0, 8);
    for (const [pair, count] of frequent) {
      const button = document.createElement("button");
      const [a, b] = [Math.floor(pair / classes.length), pair % classes.length];
      button.type = "button";
      button.dataset.pair = `${a} ${b}`;
      button.textContent = `${classes[a]} → ${classes[b]} (${whole(count)})`;
      button.addEventListener("click", () => {
        const on = button.getAttribute("aria-pressed") === "true";
        choices.given.value = on ? "" : a;
        choices.suggested.value = on ? "" : b;
        filter();
      });
      byId("pairs").append(button);
    }
  };
  let chosen = [];   // entries that the filters leave, in order
  let current = 0;   // place in them
  const filter = () => {
    const { given, suggested, state, sort, search } = choices;
    const words = search.value.trim().toLowerCase();
    chosen = [];
    for (let i = 0; i < n; i++) {
      if (given.value !== "" && at("label", i) !== Number(given.value)) continue;
      if (suggested.value !== "" && at("suggested", i) !== Number(suggested.value)) continue;
      const kind = decided.get(i)?.[0];
      if (state.value === "none" ? kind : state.value === "any" ? !kind
        : state.value && kind !== state.value) continue;
      if (words && String(at("row", i)) !== words && !nameOf(i).toLowerCase().includes(words))
        continue;
      chosen.push(i);
    }
    const sign = ["mu", "runs_found", "repeats"].includes(sort.value) ? -1 : 1;
    if (sort.value !== "rank") {
      const value = (i) => at(sort.value, i) ?? NaN;
      chosen.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return Number.isNaN(x) || Number.isNaN(y)  // what is missing comes last
          ? Number.isNaN(x) - Number.isNaN(y) : sign * (x - y);
      });
    }
    current = 0;
    for (const button of byId("pairs").children) {
      const on = button.dataset.pair === `${given.value} ${suggested.value}`;
      button.setAttribute("aria-pressed", String(on));
    }
    showPage();
    said.textContent = `${whole(chosen.length)} rows`;
  };

  // ---- rows
  const make = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== undefined && text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const seen = (i) => {
    const view = views[i];
    if (!view) return make("div", `row ${at("row", i)}`, { class: "blank", "aria-hidden": "true" });
    if (view.i !== undefined) {
      return make("img", null, { src: view.i, alt: `image of row ${at("row", i)}`,
        class: "thumbnail" });
    }
    if (view.t !== undefined) return make("p", view.t, { class: "text", dir: "auto" });
    const table = make("table", null, { class: "cells" });
    const body = table.createTBody();
    for (const [name, value] of view.c) {
      const line = body.insertRow();
      line.append(make("th", name, { scope: "row" }), make("td", value));
    }
    return table;
  };
  const labels = (i) => {
    const line = make("p", null, { class: "labels" });
    const other = suggestedOf(i);
    line.append("given ", make("strong", labelOf(i)));
    if (other === null) line.append(", nothing suggested");
    else if (other === labelOf(i)) line.append(", which the model gives it too");
    else line.append(" → suggested ", make("strong", other));
    return line;
  };
  const reach = (() => {  // the scale of all intervals: the largest finite end, 0 in the middle
    let most = 0;
    for (const name of ["mu", "mu_low", "mu_high"]) {
      for (let i = 0; i < n; i++) most = Math.max(most, Math.abs(at(name, i) ?? 0));
    }
    return most || 1;
  })();
  const interval = (i) => {
    const box = make("span", null, { class: "interval", "aria-hidden": "true" });
    const [mu, low, high] = ["mu", "mu_low", "mu_high"].map((name) => at(name, i) ?? null);
    const place = (value) => 50 + 50 * (value / reach);
    if (low !== null && high !== null) {
      const bar = make("span", null, { class: "bar" });
      bar.style.left = `${place(low)}%`;
      bar.style.width = `${Math.max(place(high) - place(low), 1)}%`;
      box.append(bar);
    }
    if (mu !== null) {
      const dot = make("span", null, { class: "dot" });
      dot.style.left = `${place(mu)}%`;
      box.append(dot);
    }
    return box;
  };
  const facts = (i) => {
    const list = make("dl");
    const add = (name, ...value) => {
      const pair = make("div");
      const said_ = make("dd");
      said_.append(...value);
      pair.append(make("dt", name), said_);
      list.append(pair);
    };
    add("score", number(at("score", i)));
    const again = at("repeats", i) ?? null;
    add("suspect in", `${at("runs_found", i)} of ${at("runs", i)} runs`
      + (again === null ? "" : "; in another with chance "
        + (again > 0.99 ? "over 0.99" : number(again, 2))));
    add("probability of the given label", number(at("p_label", i)));
    const [mu, low, high] = ["mu", "mu_low", "mu_high"].map((name) => at(name, i) ?? null);
    const ends = low === null || high === null ? "" : ` [${number(low)}, ${number(high)}]`;
    add("μ", `${number(mu)}${ends} `, ...(mu === null ? [] : [interval(i)]));
    const p = at("p_value", i);
    if (p !== undefined && p !== null) {
      const covered = at("covered", i);
      add("p-value", number(p) + (covered === undefined || covered === null ? ""
        : covered ? ", the error rate covers it" : ", not covered by the error rate"));
    }
    return list;
  };
  const act = (kind, words, key, pressed, disabled = false) => {
    const button = make("button", words, { type: "button", "data-kind": kind,
      "aria-pressed": String(pressed), "aria-keyshortcuts": key });
    button.append(" ", make("kbd", key));
    button.disabled = disabled;
    return button;
  };
  const card = (place) => {
    const i = chosen[place];
    const wide = views[i]?.t !== undefined || views[i]?.c !== undefined;
    const item = make("li", null, { class: wide ? "row wide" : "row", tabindex: "-1", "data-place": place });
    const head = make("h3", nameOf(i));
    head.append(make("span",
      ` row ${whole(at("row", i))}, rank ${whole(at("rank", i))}`, { class: "where" }));
    const state = make("p", null, { class: "state" });
    const acts = make("div", null, { class: "acts", role: "group", "aria-label": "decision" });
    const what = make("div", null, { class: "what" });
    what.append(head, labels(i), facts(i), state, acts);
    item.append(seen(i), what);
    paint(item);
    return item;
  };
  const paint = (item) => {
    const i = chosen[Number(item.dataset.place)];
    const decision = decided.get(i);
    const kind = decision?.[0];
    item.dataset.decision = kind ?? "";
    item.querySelector(".state").textContent = decision ? `decided: ${inWords(decision)}` : "";
    const other = suggestedOf(i);
    const useful = other !== null && other !== labelOf(i);
    const taken = kind === "relabel" && decision[1] === at("suggested", i);
    item.querySelector(".acts").replaceChildren(
      act("accept", "label is right", "A", kind === "accept"),
      act("reject", "remove", "X", kind === "reject"),
      act("suggested", useful ? `→ ${other}` : "→ none", "S", taken, !useful),
      act("other", "another label…", "L", kind === "relabel" && !taken),
    );
  };
  const list = byId("list");
  const first = () => PAGE * Math.floor(current / PAGE);
  const progress = () => {
    const count = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
    for (const [kind] of decided.values()) count[kind] += 1;
    byId("progress").value = decided.size / n;
    byId("counts").textContent = `${whole(decided.size)} of ${whole(n)} rows decided: `
      + `${whole(count.accept)} right, ${whole(count.reject)} to remove, `
      + `${whole(count.relabel)} relabelled`;
    byId("undo").disabled = history.length === 0;
    byId("save").disabled = byId("forget").disabled = decided.size === 0;
  };
  const showPage = (focus = false) => {
    const from = first();
    const to = Math.min(from + PAGE, chosen.length);
    const cards = [];
    for (let place = from; place < to; place++) cards.push(card(place));
    list.replaceChildren(...cards);
    list.setAttribute("start", from + 1);
    if (!cards.length) list.append(make("li", "No row passes the filters.", { class: "empty" }));
    for (const pager of document.querySelectorAll(".pager")) {
      pager.querySelector(".where").textContent = chosen.length
        ? `${whole(from + 1)}–${whole(to)} of ${whole(chosen.length)}` : "none";
      for (const button of pager.querySelectorAll("button")) {
        const back = ["first", "before"].includes(button.dataset.go);
        button.disabled = back ? from === 0 : to >= chosen.length;
      }
    }
    mark(focus);
    progress();
  };
  const cardAt = (place) => list.querySelector(`[data-place="${place}"]`);
  const mark = (focus) => {
    list.querySelector("[aria-current]")?.removeAttribute("aria-current");
    const card_ = cardAt(current);
    if (!card_) return;
    card_.setAttribute("aria-current", "true");
    if (focus) {
      card_.focus({ preventScroll: true });
      card_.scrollIntoView({ block: "nearest" });
    }
  };
  const go = (place, focus = true) => {
    if (!chosen.length) return;
    const before = first();
    current = Math.min(Math.max(place, 0), chosen.length - 1);
    if (first() === before) mark(focus);
    else {
      showPage(focus);
      if (current === first()) byId("rows").scrollIntoView({ block: "start" });
    }
  };
  const turn = (where) => {
    const last = PAGE * Math.floor((chosen.length - 1) / PAGE);
    const to = { first: 0, before: first() - PAGE, next: first() + PAGE, last }[where];
    if (to >= 0 && to < chosen.length && to !== first()) {
      go(to);
      said.textContent = `rows from ${whole(to + 1)}`;
    }
  };

  // ---- deciding
  const decide = (decision, on = true) => {
    const i = chosen[current];
    if (i === undefined) return;
    change([[i, decision]]);
    paint(cardAt(current));
    progress();
    const words = `${nameOf(i)}: ${decision ? inWords(decision) : "no decision"}`;
    if (on && decision) go(current + 1); else mark(true);
    said.textContent = `${words}. ${whole(decided.size)} decided`;
  };
  const dialog = byId("relabel");
  const pick = byId("chosen");
  classes.forEach((name, k) => pick.append(option(k, name)));
  const ask = () => {
    const i = chosen[current];
    if (i === undefined) return;
    const now = decided.get(i);
    pick.value = now?.[0] === "relabel" ? now[1] : Math.max(at("suggested", i), 0);
    dialog.returnValue = "";
    dialog.showModal();
    pick.focus();
  };
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "take") act_("take"); else mark(true);
  });
  const act_ = (kind) => {
    const i = chosen[current];
    if (i === undefined) return;
    const own = at("label", i);
    if (kind === "accept") decide(["accept", own]);
    else if (kind === "reject") decide(["reject", -1]);
    else if (kind === "clear") decide(undefined);
    else if (kind === "other") ask();
    else {
      const label = kind === "take" ? Number(pick.value) : at("suggested", i);
      if (label < 0 || (kind === "suggested" && label === own)) return;
      decide(label === own ? ["accept", own] : ["relabel", label]);
    }
  };
  list.addEventListener("click", (event) => {
    const item = event.target.closest("li.row");
    if (!item) return;
    const place = Number(item.dataset.place);
    const button = event.target.closest("button[data-kind]");
    const kind = button?.dataset.kind;
    const again = button?.getAttribute("aria-pressed") === "true" && kind !== "other";
    current = place;
    if (kind) act_(again ? "clear" : kind); else mark(!getSelection().toString());
  });
  list.addEventListener("focusin", (event) => {
    const item = event.target.closest("li.row");
    if (item && Number(item.dataset.place) !== current) {
      current = Number(item.dataset.place);
      mark(false);
    }
  });
  const keys = byId("keys");
  const ON = { a: "accept", x: "reject", s: "suggested", l: "other", c: "clear" };
  document.addEventListener("keydown", (event) => {
    if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    const inside = event.target.closest("input, select, textarea, summary");
    if (inside) return;
    const key = event.key.toLowerCase();
    const step = { j: 1, arrowdown: 1, k: -1, arrowup: -1 }[key];
    const here = list.contains(document.activeElement);
    if (step) go(here ? current + step : current);
    else if (ON[key]) act_(ON[key]);
    else if (key === "u") undo();
    else if (key === "n") turn("next");
    else if (key === "p") turn("before");
    else return;
    event.preventDefault();
  });
  for (const button of document.querySelectorAll(".pager button")) {
    button.addEventListener("click", () => turn(button.dataset.go));
  }
  for (const name of ["given", "suggested", "state", "sort"]) {
    choices[name].addEventListener("change", filter);
  }
  choices.search.addEventListener("input", filter);
  byId("undo").addEventListener("click", undo);
  byId("forget").addEventListener("click", () => {
    change(Array.from(decided.keys(), (i) => [i, undefined]));
    showPage();
    said.textContent = "all decisions forgotten; undo brings them back";
  });

  // ---- csv: written for spreadsheets, read back
  const plain = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
  const cell = (value) => {
    // a cell that a spreadsheet would take for a formula begins with an apostrophe
    let text = String(value);
    if (/^'*\s*[=+\-@]/.test(text) && !plain.test(text)) text = `'${text}`;
    return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const uncell = (text) => (/^'+\s*[=+\-@]/.test(text) ? text.slice(1) : text);
  const written = () => {
    const lines = ["row,name,decision,label"];
    for (const i of Array.from(decided.keys()).sort((a, b) => at("row", a) - at("row", b))) {
      const [kind, label] = decided.get(i);
      const name = label < 0 ? "" : classes[label];
      lines.push([at("row", i), nameOf(i), kind, name].map(cell).join(","));
    }
    return `${lines.join("\n")}\n`;
  };
  byId("save").addEventListener("click", () => {
    keepNow();
    const link = document.createElement("a");
    const file = new Blob([written()], { type: "text/csv" });
    link.href = URL.createObjectURL(file);
    link.download = "decisions.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    said.textContent = `${whole(decided.size)} decisions saved as decisions.csv`;
  });
  const table = (text) => {  // a csv with quotes
    const lines = [];
    let line = [];
    let field = "";
    let quoted = false;
    for (let i = 0; i < text.length; i++) {
      const c = text[i];
      if (quoted) {
        if (c !== '"') field += c;
        else if (text[i + 1] === '"') { field += c; i += 1; } else quoted = false;
      } else if (c === '"') quoted = true;
      else if (c === ",") { line.push(field); field = ""; }
      else if (c === "\n" || c === "\r") {
        if (c === "\r" && text[i + 1] === "\n") i += 1;
        line.push(field);
        lines.push(line);
        line = [];
        field = "";
      } else field += c;
    }
    if (quoted) throw new Error("a quotation mark is not closed");
    if (field !== "" || line.length) lines.push([...line, field]);
    return lines.filter((each) => each.length > 1 || each[0] !== "");
  };
  const load = (text) => {
    const [head = [], ...lines] = table(text.replace(/^\ufeff/, ""));
    const places = ["row", "name", "decision", "label"].map((name) => head.indexOf(name));
    if (places.includes(-1)) {
      throw new Error("its first line must be row,name,decision,label, as this page saves it; "
        + `it is ${head.join(",").slice(0, 100) || "empty"}`);
    }
    const at_ = new Map(classes.map((name, k) => [name, k]));
    return lines.map((line, number_) => {
      const [row, name, kind, label] = places.map((place) => uncell(line[place] ?? ""));
      const where = `line ${number_ + 2}`;
      const i = /^\d+$/.test(row) ? entryOf.get(Number(row)) : undefined;
      if (i === undefined) throw new Error(`${where}: these data have no row ${row}`);
      if (name !== nameOf(i)) {
        throw new Error(`${where}: row ${row} is called ${nameOf(i)} here and ${name} in the `
          + "file, so it belongs to other data");
      }
      if (!KINDS.includes(kind)) {
        throw new Error(`${where}: the decision is accept, reject or relabel, not ${kind}`);
      }
      const class_ = kind === "reject" ? -1 : kind === "accept" ? at("label", i) : at_.get(label);
      if (class_ === undefined) throw new Error(`${where}: ${label} is none of the classes`);
      return [i, [kind, class_]];
    });
  };
  byId("load").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    if (!file) return;
    try {
      const pairs = load(await file.text());
      warn("");
      if (pairs.length) change(pairs);
      filter();
      said.textContent = `${whole(pairs.length)} decisions loaded`;
    } catch (error) {
      warn(`${file.name} was not loaded: ${error.message}.`);
    }
    event.target.value = "";
  });

  recall();
  fill();
  filter();
})();
