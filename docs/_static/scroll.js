// What is wider than the page scrolls inside itself: a keyboard reaches it, a screen reader names it, and a shadow says that there is more.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = [...document.querySelectorAll("article .table-wrapper, article .highlight pre, article div.math, article .output pre")];
  const name = box => {
    const kind = box.matches(".table-wrapper") ? "Table" : box.matches(".math") ? "Formula" : "Code";
    const title = box.closest("section")?.querySelector("h1, h2, h3, h4")?.firstChild?.textContent.trim();
    return `${kind}, scrolls sideways${title ? `: ${title}` : ""}`;
  };
  const ends = box => {
    box.classList.toggle("more-left", box.scrollLeft > 1);
    box.classList.toggle("more-right", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  };
  const look = box => {
    const wide = box.scrollWidth > box.clientWidth + 1;
    if (wide && !box.hasAttribute("tabindex")) {
      for (const [key, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", name(box)]]) box.setAttribute(key, value);
      box.addEventListener("scroll", () => ends(box), {passive: true});
    } else if (!wide) {
      for (const key of ["tabindex", "role", "aria-label"]) box.removeAttribute(key);
    }
    ends(box);
  };
  const seen = new ResizeObserver(changes => changes.forEach(change => look(change.target)));
  boxes.forEach(box => seen.observe(box));
});
