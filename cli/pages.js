(() => {
  "use strict";
  const root = document.documentElement, panel = document.querySelector("aside");
  const tokens = [...document.querySelectorAll("a.t")];
  const detail = new Map(tokens.map((token) => [token, document.getElementById(token.hash.slice(1))]));
  let shown = null, pinned = null;
  root.classList.add("js");
  // A fragment leads to the token itself, not to its details: those are shown beside it.
  for (const [token, article] of detail) { token.id = article.id; article.removeAttribute("id"); }

  const show = (token) => {
    if (token === shown) return;
    if (shown) { shown.classList.remove("on"); detail.get(shown).classList.remove("on"); }
    if (token) { token.classList.add("on"); detail.get(token).classList.add("on"); panel.scrollTop = 0; }
    shown = token;
    root.classList.toggle("open", Boolean(token));
  };
  const reach = (token) => {  // one stop of the Tab key for the whole text: arrows go on from there
    for (const other of tokens) other.tabIndex = -1;
    (token || tokens[0]).tabIndex = 0;
  };
  const pin = (token) => {
    pinned = token;
    show(token);
    if (token) reach(token);
    try { history.replaceState(null, "", token ? token.hash : "#"); } catch { /* a page that is not at an address */ }
  };
  const turn = (by) => {
    const next = tokens[tokens.indexOf(shown) + by];
    if (next) { pin(next); next.scrollIntoView({ block: "nearest" }); }
    return next;
  };

  for (const token of tokens) {
    token.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") show(token); });
    token.addEventListener("focus", () => { reach(token); show(token); });
    token.addEventListener("click", (event) => { event.preventDefault(); pin(token === pinned ? null : token); });
    token.addEventListener("keydown", (event) => {
      const to = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = to ? tokens[tokens.indexOf(token) + to] : { Home: tokens[0], End: tokens.at(-1) }[event.key];
      if (next) { event.preventDefault(); next.focus(); }
    });
  }
  for (const text of document.querySelectorAll(".text")) {
    text.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && pinned) show(pinned); });
    text.addEventListener("focusout", (event) => { if (!text.contains(event.relatedTarget) && !panel.contains(event.relatedTarget)) show(pinned); });
  }
  panel.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) button.value === "0" ? pin(null) : turn(Number(button.value));
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") pin(null); });
  addEventListener("hashchange", () => pin(tokens.find((token) => token.hash === location.hash) || null));

  // A document's own part in each token: while it is pointed at, and for as long as it is pressed.
  for (const section of document.querySelectorAll("section")) {
    const of = (number) => { number ? (section.dataset.of = number) : delete section.dataset.of; };
    let pressed = "";
    for (const button of section.querySelectorAll("td button")) {
      button.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") of(button.value); });
      button.addEventListener("pointerleave", () => of(pressed));
      button.addEventListener("click", () => {
        pressed = pressed === button.value ? "" : button.value;
        for (const other of section.querySelectorAll("td button")) other.setAttribute("aria-pressed", String(other.value === pressed));
        of(pressed);
      });
    }
  }
  reach(null);
  const wanted = tokens.find((token) => token.hash === location.hash);
  if (wanted) pin(wanted);
})();
