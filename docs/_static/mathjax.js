// The widgets' labels ask for MathJax 2, and none of them holds a formula.
window.MathJax.startup = { ready() { MathJax.startup.defaultReady(); MathJax.Hub = { Queue() {} } } }
