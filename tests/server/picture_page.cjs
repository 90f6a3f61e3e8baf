// Takes the README's pictures of a server's page: node picture_page.cjs URL CHROMIUM FOLDER.
const { chromium } = require("playwright-core");
(async () => {
  const [url, executablePath, folder] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  for (const colorScheme of ["light", "dark"]) {
    const page = await browser.newPage({ viewport: { width: 1000, height: 640 }, colorScheme });
    await page.goto(url);
    await page.waitForFunction(() => document.getElementById("pages").textContent.includes("of"));
    await page.locator("summary", { hasText: "Settings" }).click();
    await page.fill("#temperature", "0");
    await page.fill("#max_tokens", "60");
    await page.locator("summary", { hasText: "Settings" }).click();
    await page.fill("#prompt", "Why is the sky blue?");
    await page.click("#send");
    await page.waitForFunction(() => /tokens/.test(document.getElementById("status").textContent), null, { timeout: 60000 });
    await page.locator("summary", { hasText: "Settings" }).click();
    await page.fill("#max_tokens", "700");
    await page.locator("summary", { hasText: "Settings" }).click();
    await page.fill("#prompt", "Write a story about a lighthouse.");
    await page.click("#send");
    await page.waitForTimeout(3000);
    await page.evaluate(() => scrollTo(0, 0));
    await page.screenshot({ path: `${folder}/page-${colorScheme}.png` });
    await page.keyboard.press("Escape");
    await page.close();
  }
  await browser.close();
})().catch(error => { console.error(error); process.exit(1); });
