// The filter of the paper map: by paper, kind and verdict, and by words such as "§4.2" or "table 7". The choice stands in the address.
document.addEventListener("DOMContentLoaded", () => {
  const anchors = [...document.querySelectorAll("li a[id]")].filter(a => a.parentElement.querySelector("em"));
  const title = document.querySelector("h1");
  if (!title || !title.textContent.startsWith("The paper map") || !anchors.length) return;
  const entries = anchors.map(anchor => {
    const item = anchor.closest("li"), section = item.closest("section");
    const [, kind] = item.textContent.split(" · ");
    return {
      item, section, kind: kind.trim(), text: item.textContent.toLowerCase(),
      paper: section.querySelector("h2").firstChild.textContent.split(" (")[0],
      verdict: item.querySelector("em").textContent,
    };
  });
  const asked = new URLSearchParams(location.search);
  const form = document.createElement("form");
  form.className = "map-filter";
  form.setAttribute("role", "search");
  const fields = {};
  for (const name of ["paper", "kind", "verdict"]) {
    const select = document.createElement("select");
    select.append(new Option(`every ${name}`, ""));
    for (const value of new Set(entries.map(entry => entry[name]))) select.append(new Option(value, value));
    select.value = asked.get(name) ?? "";
    if (select.selectedIndex < 0) select.value = "";
    fields[name] = select;
  }
  const words = Object.assign(document.createElement("input"), {type: "search", placeholder: "section or words, such as §4.2"});
  words.value = asked.get("words") ?? "";
  fields.words = words;
  for (const [name, field] of Object.entries(fields)) {
    field.setAttribute("aria-label", name);
    form.append(field);
  }
  const said = document.createElement("p");
  said.setAttribute("aria-live", "polite");
  form.append(said);
  document.querySelector("section > section h2").closest("section").before(form);

  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const entry of entries) {
      const fits = ["paper", "kind", "verdict"].every(name => !fields[name].value || entry[name] === fields[name].value);
      entry.item.hidden = !(fits && wanted.every(word => entry.text.includes(word)));
      count += !entry.item.hidden;
    }
    for (const section of new Set(entries.map(entry => entry.section))) {
      section.hidden = entries.every(entry => entry.section !== section || entry.item.hidden);
    }
    said.textContent = `${count} of ${entries.length} entries`;
    const chosen = new URLSearchParams(Object.entries(fields).map(([name, field]) => [name, field.value]).filter(([, value]) => value));
    if (location.protocol !== "file:") history.replaceState(null, "", `${location.pathname}${chosen.size ? `?${chosen}` : ""}${location.hash}`);
  }
  form.addEventListener("input", show);
  form.addEventListener("submit", event => event.preventDefault());
  show();
});
