"use strict";
(() => {
  const said = document.getElementById("said");

  // ---- sorting: the button of a heading sorts the rows of its table
  const valueOf = (row, column, kind) => {
    const cell = row.children[column];
    const given = cell.dataset.value ?? cell.textContent;
    return kind === "number" ? (given === "" ? NaN : Number(given)) : given;
  };
  const compare = (a, b) =>
    typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });

  const sort = (head) => {
    const table = head.closest("table");
    const body = table.tBodies[0];
    const column = head.cellIndex;
    const kind = head.dataset.kind;
    const other = { ascending: "descending", descending: "ascending" };
    const now = head.getAttribute("aria-sort");
    const order = now === "none" ? head.dataset.first : other[now];
    const sign = order === "ascending" ? 1 : -1;
    const rows = Array.from(body.rows, (row) => [valueOf(row, column, kind), row]);
    const missing = (value) => typeof value === "number" && Number.isNaN(value);
    // what is undefined comes last in either direction; ties keep their order
    rows.sort(([a], [b]) =>
      missing(a) || missing(b) ? missing(a) - missing(b) : sign * compare(a, b));
    body.append(...rows.map(([, row]) => row));
    for (const each of table.querySelectorAll("th[aria-sort]")) {
      each.setAttribute("aria-sort", each === head ? order : "none");
    }
    const name = head.querySelector("button span").textContent;
    said.textContent = `sorted by ${name}, ${order}`;
  };
  for (const button of document.querySelectorAll("th[aria-sort] > button")) {
    button.addEventListener("click", () => sort(button.parentElement));
  }

  // ---- long tables show their first rows, whatever they are sorted by
  const FIRST = 12;
  for (const table of document.querySelectorAll("table.board, table.headlines")) {
    const count = table.tBodies[0].rows.length;
    if (count <= FIRST + 3) continue;
    table.classList.add("short");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "more";
    const say = (open) => {
      table.classList.toggle("short", !open);
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? `the first ${FIRST} rows` : `all ${count} rows`;
    };
    button.addEventListener("click", () => say(table.classList.contains("short")));
    say(false);
    table.closest(".scroll").after(button);
  }

  // ---- images: drawings are compressed, and an example's image is in the page once
  const unzip = async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(plain).text();
  };
  const fill = (page) => {
    for (const image of page.querySelectorAll("img[data-gz]")) {
      const packed = image.dataset.gz;
      image.removeAttribute("data-gz");
      unzip(packed).then((svg) => {
        image.src = `data:image/svg+xml,${encodeURIComponent(svg)}`;
      }, () => { image.alt += " (this browser cannot unpack it)"; });
    }
    const block = page.querySelector("script.images");
    if (!block) return;
    const images = JSON.parse(block.textContent);
    for (const image of page.querySelectorAll("img[data-image]")) {
      image.src = `data:image/png;base64,${images[image.dataset.image]}`;
    }
    block.remove();
  };

  // ---- pages: one section at a time, by the fragment of the address
  const pages = Array.from(document.querySelectorAll("section.page"));
  const links = Array.from(document.querySelectorAll("nav a"));
  const show = () => {
    let id = location.hash.slice(1);
    try { id = decodeURIComponent(id); } catch { /* no address of ours; the overview is shown */ }
    if (id === "main") return;
    // a link may lead to a page or to a place in one
    const place = document.getElementById(id);
    const page = place?.closest("section.page") ?? pages[0];
    for (const each of pages) each.hidden = each !== page;
    fill(page);
    for (const link of links) {
      if (link.hash === `#${page.id}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (place && place !== page) place.scrollIntoView();
    else window.scrollTo(0, 0);
  };
  window.addEventListener("hashchange", show);
  window.addEventListener("beforeprint", () => pages.forEach(fill));
  show();
})();
