// What the theme adds when a page is shown gets names, and tables that scroll are reached by the keyboard.
const named = () => {
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`))
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((wrap, i) => {
    wrap.tabIndex = 0
    wrap.setAttribute("role", "group")
    wrap.setAttribute("aria-label", `Table ${i + 1}`)
  })
}
new MutationObserver(named).observe(document.querySelector("article") ?? document.body, { childList: true, subtree: true })
named()
document.querySelector("[data-md-component=search]")?.setAttribute("aria-label", "Search")
