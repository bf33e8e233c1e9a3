// Opens the page for one dashboard after another and takes a picture of each.
// stdin: {chromium, flags, prometheus, width, range, to, theme, jobs: [{dashboard, out, variables: {name: [value]}}]}
// stdout: one JSON line per job: {out, panels, problems: [{panel, kind, text}]}
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { extname, join, normalize } from 'node:path';
import { fileURLToPath } from 'node:url';
import puppeteer from 'puppeteer-core';

const given = [];
for await (const part of process.stdin) given.push(part);
const asked = JSON.parse(Buffer.concat(given).toString('utf8'));
const built = join(fileURLToPath(new URL('.', import.meta.url)), 'built');
const kinds = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css' };
let dashboard = '{}';

const server = createServer((request, response) => {
  const path = new URL(request.url, 'http://x').pathname;
  if (path === '/dashboard.json') {
    response.writeHead(200, { 'content-type': 'application/json' }).end(dashboard);
    return;
  }
  try {
    const file = join(built, normalize(path));
    if (!file.startsWith(built)) throw new Error('outside');
    const content = readFileSync(file);
    response.writeHead(200, { 'content-type': kinds[extname(file)] ?? 'application/octet-stream' }).end(content);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((done) => server.listen(0, '127.0.0.1', done));
const origin = `http://127.0.0.1:${server.address().port}`;

const browser = await puppeteer.launch({
  executablePath: asked.chromium,
  headless: true,
  protocolTimeout: 180000,
  args: [...asked.flags, '--hide-scrollbars', '--force-color-profile=srgb', '--disable-gpu'],
});
try {
  for (const job of asked.jobs) {
    dashboard = JSON.stringify(job.dashboard);
    const page = await browser.newPage();
    const problems = [];
    page.on('pageerror', (error) => problems.push({ panel: '', kind: 'page', text: String(error.message ?? error) }));
    await page.setViewport({ width: asked.width, height: 1000, deviceScaleFactor: 1 });
    const query = new URLSearchParams({ prometheus: asked.prometheus, range: asked.range, to: asked.to, theme: asked.theme });
    for (const [name, values] of Object.entries(job.variables)) for (const v of values) query.append(`var-${name}`, v);
    await page.goto(`${origin}/index.html?${query}`);
    await page.waitForSelector('[data-ready], [data-failed]', { timeout: 120000 });
    const height = await page.evaluate(() => document.querySelector('[data-ready]')?.scrollHeight ?? 400);
    await page.setViewport({ width: asked.width, height: Math.ceil(height), deviceScaleFactor: 1 });
    await page.waitForFunction(() => !document.querySelector('[data-loading]'), { timeout: 120000 });
    await new Promise((done) => setTimeout(done, 700)); // charts draw in the frame after
    const seen = await page.evaluate(() =>
      [...document.querySelectorAll('[data-state]')].map((e) => ({
        panel: e.dataset.panel ?? '', kind: e.dataset.state, text: e.textContent.trim(),
      })),
    );
    await page.screenshot({ path: job.out, fullPage: true });
    await page.close();
    problems.push(...seen.filter((s) => s.kind !== 'drawn'));
    console.log(JSON.stringify({ out: job.out, panels: seen.length, problems }));
  }
} finally {
  await browser.close();
  server.close();
}
