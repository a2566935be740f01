// An element with its attributes, event listeners ("onclick") and children. It stands before viewer.js, and in the demo before
// steps.js too: see `component_script`.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

