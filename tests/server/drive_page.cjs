// Drives the page in Chromium: node drive_page.cjs URL CHROMIUM FOLDER. Prints what it has seen, as JSON.
const { chromium } = require("playwright-core");
(async () => {
  const [url, executablePath, folder] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const page = await browser.newPage({ viewport: { width: 1200, height: 850 }, colorScheme: "light" });
  const seen = { errors: [], hosts: [], bodies: [] };
  page.on("pageerror", error => seen.errors.push(String(error)));
  page.on("console", message => message.type() === "error" && seen.errors.push(message.text()));
  page.on("request", request => {
    const host = new URL(request.url()).host;
    if (host && !seen.hosts.includes(host)) seen.hosts.push(host);
    if (request.url().endsWith("/chat/completions")) seen.bodies.push(request.postDataJSON());
  });
  const text = selector => page.locator(selector).textContent();
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("pages").textContent.includes("of"));
  seen.model = await text("#model");

  await page.keyboard.type("Why?");  // the message has the focus
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => /tokens/.test(document.getElementById("status").textContent), null, { timeout: 60000 });
  seen.answer = await page.locator(".turn").nth(1).textContent();
  seen.title = await page.locator(".token").first().getAttribute("title");
  seen.status = await text("#status");
  await page.screenshot({ path: `${folder}/light.png` });

  await page.locator("summary", { hasText: "Settings" }).click();
  await page.fill("#system", "Be <b>brief</b>.");
  await page.fill("#temperature", "0");
  await page.fill("#seed", "7");
  await page.fill("#stops", "zzzz\nyyyy");
  await page.fill("#max_tokens", "1800");
  await page.uncheck("#logprobs");
  await page.fill("#prompt", "Go on and on");
  await page.click("#send");
  await page.waitForFunction(() => document.getElementById("num-running").textContent === "1", null, { timeout: 60000 });
  seen.live = { running: await page.locator("#running li").count(), pages: await text("#pages") };
  await page.keyboard.press("Escape");
  await page.waitForFunction(() => document.getElementById("status").textContent === "stopped");
  await page.waitForFunction(() => document.getElementById("num-running").textContent === "0");

  await page.locator("summary", { hasText: "Export" }).click();
  await page.fill("#prompt", "It's");
  await page.click("#curl");
  seen.curl = await text("#code");
  await page.click("#python");
  seen.python = await text("#code");
  const back = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const light = await back();
  await page.click("#theme");
  seen.dark = (await back()) !== light;
  await page.setViewportSize({ width: 390, height: 800 });
  seen.fits = await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
  await page.screenshot({ path: `${folder}/dark.png` });
  seen.unnamed = await page.evaluate(() => [...document.querySelectorAll("button, input, textarea, canvas")].filter(each =>
    !(each.labels?.length || each.getAttribute("aria-label") || each.textContent.trim())).map(each => each.outerHTML));
  console.log(JSON.stringify(seen));
  await browser.close();
})().catch(error => { console.error(error); process.exit(1); });
