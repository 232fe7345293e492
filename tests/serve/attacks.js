// What `test_foreign_pages.py` does in a page against a server at `url`; it returns what was read.
async (url) => {
  const body = '{"prompt": "hello", "max_tokens": 2}';
  const path = url + "/v1/completions", erase = url + "/slots/0?action=erase";
  const post = (target, options) => fetch(target, {method: "POST", ...options});
  const json = {headers: {"Content-Type": "application/json"}, body};
  const plain = new Blob([body], {type: "text/plain"}), bare = new Blob([body]);
  const read = (request) => request.then((answer) => answer.text()).catch(() => "");
  const loaded = (tag, src) => new Promise((resolve) => {
    const onload = () => resolve(tag === "img" ? `${element.width} pixels` : "it ran");
    const element = document.createElement(tag);
    Object.assign(element, {onload, onerror: () => resolve(""), src});
    document.body.append(element);
  });
  const form = (action) => new Promise((resolve) => {
    const [frame, form, input] = ["iframe", "form", "input"].map((t) => document.createElement(t));
    frame.name = "frame" + Math.random();
    Object.assign(form, {method: "POST", action, enctype: "text/plain", target: frame.name});
    input.name = '{"prompt": "hello", "max_tokens": 2, "user": "';
    input.value = '"}';
    form.append(input);
    document.body.append(frame, form);
    frame.onload = () => {
      try { resolve(frame.contentDocument.body.innerText); } catch (error) { resolve(""); }
    };
    form.submit();
  });
  return {
    "fetch": await read(post(path, json)),
    "text": await read(post(path, {body: plain})),
    "no-cors": await read(post(path, {body: plain, mode: "no-cors"})),
    "no type": await read(post(path, {body: bare, mode: "no-cors"})),
    "erase": await read(post(erase, {mode: "no-cors"})),
    "get": await read(fetch(url + "/v1/models")),
    "health": await read(fetch(url + "/health")),
    "image": await loaded("img", url + "/metrics"),
    "script": await loaded("script", url + "/v1/models"),
    "form": await form(path),
    "form that erases": await form(erase),
    "beacon": navigator.sendBeacon(path, plain) && navigator.sendBeacon(erase) ? "" : "not sent",
  };
}
