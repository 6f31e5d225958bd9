// The filter of the paper map: by paper, kind and verdict, and by places and words such as "§4.2", "figure 2" or "1.2 TB". The choice stands
// in the address. A place that is asked for is looked for where entries stand first; only if none stands there, in what they say.
(() => {
  const DIGITS = String.raw`\d+(?:\.\d+)*`, LETTERS = String.raw`[a-h](?![a-z])(?:\.\d+)*`;
  const listed = one => String.raw`((?:${one})(?:(?:\s*,\s*(?:and\s+)?|\s+(?:and|to)\s+)(?:${one}))*)(?!\w)`;
  const PLACES = new RegExp(
    String.raw`\b(fig|tab|eq|sec)(?:ure|le|uation|tion)?s?\.?\s*${listed(DIGITS)}|(§)\s*${listed(`§?${DIGITS}`)}|`
    + String.raw`\b(app)(?:endix|endices)?\.?\s*${listed(LETTERS)}|(?<![\w.])([a-h]\.\d+)`, "g");

  // the places that a text names, such as "fig 2" and "sec 4.2", and the text without them
  function places(text) {
    const found = [];
    const rest = text.toLowerCase().replace(PLACES, (all, kind, numbers, sign, sections, appendix, letters, bare) => {
      const what = kind ?? (sign ? "sec" : "app");
      const parts = (numbers ?? sections ?? letters ?? bare).split(/\s*,\s*(?:and\s+)?|\s+and\s+/);
      for (const part of parts.map(part => part.replaceAll("§", ""))) {
        const [first, last] = part.split(/\s+to\s+/);
        for (let i = Number(first); last && i < Number(last); i++) found.push(`${what} ${i}`);
        found.push(`${what} ${last ?? first}`);
      }
      return " ";
    });
    return {found, rest};
  }

  // 18,874,368 is 18874368, and 1.2 TB is 1.2tb
  const plain = text => text.toLowerCase().replace(/(\d),(?=\d{3}(?!\d))/g, "$1")
    .replace(/(\d)\s+(?=(?:[kmgt]i?b|b|bits?|bytes?|ms|s|%)(?![a-z\d]))/g, "$1");
  // a number is found from its first digit on
  const finds = word => {
    const escaped = word.replace(/[.*+?^${}()|[\]\\]/g, String.raw`\$&`);
    return new RegExp(/^\d/.test(word) ? String.raw`(?<![\d.])${escaped}` : escaped);
  };
  const stands = (place, there) => there.some(one => one === place || one.startsWith(`${place}.`));

  document.addEventListener("DOMContentLoaded", () => {
    const title = document.querySelector("h1");
    const anchors = [...document.querySelectorAll("li a[id]")].filter(a => a.parentElement.querySelector("em"));
    if (!title || !title.textContent.startsWith("The paper map") || !anchors.length) return;
    const entries = anchors.map(anchor => {
      const item = anchor.closest("li"), head = anchor.parentElement, section = item.closest("section");
      const [, kind] = head.textContent.split(" · "), where = head.querySelector("strong").textContent;
      return {
        item, section, kind: kind.trim(), paper: section.querySelector("h2").firstChild.textContent.split(" (")[0],
        verdict: head.querySelector("em").textContent, places: places(where).found, mentions: places(head.textContent).found,
        text: plain(head.textContent), names: item.textContent.toLowerCase(),
      };
    });
    const asked = new URLSearchParams(location.search);
    const form = Object.assign(document.createElement("form"), {className: "map-filter"});
    form.setAttribute("role", "search");
    form.setAttribute("aria-label", "Entries of the map");
    const fields = {};
    for (const name of ["paper", "kind", "verdict"]) {
      const select = document.createElement("select");
      select.append(new Option(`every ${name}`, ""));
      for (const value of new Set(entries.map(entry => entry[name]))) select.append(new Option(value, value));
      select.value = asked.get(name) ?? "";
      if (select.selectedIndex < 0) select.value = "";
      fields[name] = select;
    }
    const words = Object.assign(document.createElement("input"), {type: "search", placeholder: "figure 2, §4.2, or words"});
    words.value = asked.get("words") ?? "";
    fields.words = words;
    for (const [name, field] of Object.entries(fields)) {
      field.setAttribute("aria-label", name === "words" ? "place or words" : name);
      form.append(field);
    }
    const said = document.createElement("p");
    said.setAttribute("aria-live", "polite");
    const all = Object.assign(document.createElement("button"), {type: "button", textContent: "show all"});
    form.append(said, all);
    title.after(form);

    function show() {
      const {found: wanted, rest} = places(words.value);
      const tests = plain(rest).split(/\s+/).filter(Boolean).map(word => [finds(word), /[_/]|\.py/.test(word)]);
      const fits = entries.filter(entry => ["paper", "kind", "verdict"].every(name => !fields[name].value || entry[name] === fields[name].value)
        && tests.every(([test, named]) => test.test(named ? entry.names : entry.text)));
      const here = fits.filter(entry => wanted.every(place => stands(place, entry.places)));
      const shown = new Set(here.length ? here : fits.filter(entry => wanted.every(place => stands(place, entry.mentions))));
      for (const entry of entries) entry.item.hidden = !shown.has(entry);
      for (const section of new Set(entries.map(entry => entry.section))) {
        section.hidden = entries.every(entry => entry.section !== section || entry.item.hidden);
      }
      said.textContent = `${shown.size} of ${entries.length} entries`
        + (wanted.length && shown.size && !here.length ? ", which mention it; none is about it" : "");
      const chosen = new URLSearchParams(Object.entries(fields).map(([name, field]) => [name, field.value]).filter(([, value]) => value));
      all.hidden = !chosen.size;
      try {
        history.replaceState(null, "", `${location.pathname}${chosen.size ? `?${chosen}` : ""}${location.hash}`);
      } catch { /* a browser that keeps the addresses of files as they are */ }
    }
    form.addEventListener("input", show);
    form.addEventListener("submit", event => event.preventDefault());
    all.addEventListener("click", () => {
      for (const field of Object.values(fields)) field.value = "";
      show();
      words.focus();
    });
    show();
    document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView({behavior: "instant"});
  });
})();
