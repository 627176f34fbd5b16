// Drives the chat page in headless Chromium over its debugging protocol: node drive_page.mjs CHROMIUM URL FOLDER
import { spawn } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [chromium, url, folder] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), "page-"));
const browser = spawn(chromium, ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
  `--user-data-dir=${profile}`, "about:blank"], { stdio: ["ignore", "ignore", "pipe"] });
const endpoint = await new Promise(resolve => {
  let said = "";
  browser.stderr.on("data", data => {
    said += data;
    const found = said.match(/ws:\/\/[^\s]+/);
    if (found) resolve(found[0]);
  });
});
const socket = new WebSocket(endpoint);
await new Promise(resolve => socket.addEventListener("open", resolve));
let last = 0, session;
const waiting = new Map();
socket.addEventListener("message", event => {
  const message = JSON.parse(event.data);
  if (message.id) { waiting.get(message.id)(message.result || message.error); waiting.delete(message.id); }
  if (message.method === "Runtime.exceptionThrown") { console.log(JSON.stringify({ exception: message.params })); }
});
const call = (method, params = {}) => new Promise(resolve => {
  waiting.set(++last, resolve);
  socket.send(JSON.stringify({ id: last, method, params, ...(session && { sessionId: session }) }));
});
const { targetId } = await call("Target.createTarget", { url: "about:blank" });
session = (await call("Target.attachToTarget", { targetId, flatten: true })).sessionId;
await call("Page.enable");
await call("Runtime.enable");
const evaluate = async expression =>
  (await call("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true })).result.value;
const until = async (expression, seconds = 30) => {
  for (let i = 0; i < seconds * 20; i++) {
    if (await evaluate(expression)) return;
    await new Promise(resolve => setTimeout(resolve, 50));
  }
  throw new Error(`never became true: ${expression}`);
};
const type = async text => {
  await evaluate(`document.getElementById("text").focus()`);
  await call("Input.insertText", { text });
  for (const kind of ["keyDown", "keyUp"]) await call("Input.dispatchKeyEvent", { type: kind, key: "Enter", code: "Enter", windowsVirtualKeyCode: 13, text: "\r" });
};
const picture = async name => {
  const { data } = await call("Page.captureScreenshot", { format: "png" });
  writeFileSync(join(folder, name), Buffer.from(data, "base64"));
};
const report = {};
try {
  await call("Emulation.setDeviceMetricsOverride", { width: 1000, height: 700, deviceScaleFactor: 1, mobile: false });
  await call("Page.navigate", { url });
  await until(`document.title !== "phi-edge" && document.getElementById("send")`);
  report.title = await evaluate("document.title");
  await type("def f(x):");
  await until(`document.querySelectorAll(".assistant").length === 1 && document.getElementById("send").textContent === "Send"`);
  report.first = await evaluate(`document.querySelector(".assistant").textContent`);
  report.note = await evaluate(`[...document.querySelectorAll(".note")].pop().textContent`);
  await picture("wide.png");
  // Stop while it streams.
  await type("<b>go on</b>");
  await until(`document.querySelectorAll(".assistant").length === 2 && document.querySelectorAll(".assistant")[1].textContent.length > 3`);
  report.button = await evaluate(`document.getElementById("send").textContent`);
  await evaluate(`document.getElementById("send").click()`);
  await until(`document.getElementById("send").textContent === "Send"`);
  report.stopped = await evaluate(`[...document.querySelectorAll(".note")].pop().textContent`);
  report.markup = await evaluate(`document.querySelectorAll("main b").length`);
  await call("Emulation.setDeviceMetricsOverride", { width: 360, height: 640, deviceScaleFactor: 2, mobile: true });
  await new Promise(resolve => setTimeout(resolve, 300));
  report.wider = await evaluate("document.documentElement.scrollWidth > innerWidth");
  await picture("narrow.png");
  await evaluate(`document.getElementById("new").click()`);
  report.after = await evaluate(`document.getElementById("log").children.length`);
} finally {
  console.log(JSON.stringify(report));
  browser.kill();
}
process.exit(0);
