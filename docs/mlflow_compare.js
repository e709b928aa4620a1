// Screenshots of MLflow's compare view: node docs/mlflow_compare.js http://127.0.0.1:5000 STUDY X_METRIC Y_METRIC DIR
// Wants `npm install playwright-core` and Debian's chromium. Runs without both metrics are left out.
const { chromium } = require("playwright-core");
const fs = require("fs"), os = require("os"), path = require("path");

const [server, study, x, y, directory] = process.argv.slice(2);
const quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

async function ask(method, query, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  return (await fetch(`${server}/api/2.0/mlflow/${method}${query}`, options)).json();
}

async function main() {
  const found = await ask("experiments/get-by-name", `?experiment_name=${encodeURIComponent(study)}`);
  const id = found.experiment.experiment_id;
  const all = (await ask("runs/search", "", { experiment_ids: [id], max_results: 100 })).runs;
  const runs = all.filter(({ data }) => [x, y].every((name) => (data.metrics || []).some((one) => one.key === name)));
  const value = (run, name) => Number((run.data.params.find((one) => one.key === name) || {}).value);
  const varied = runs[0].data.params.map((one) => one.key).filter((name) => !name.startsWith("fingerprint.") &&
    runs.every((run) => Number.isFinite(value(run, name))) && new Set(runs.map((run) => value(run, name))).size > 1);
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "mlflow-compare-"));
  const browser = await chromium.launchPersistentContext(profile, {
    executablePath: "/usr/bin/chromium", args: quiet, viewport: { width: 1500, height: 640 },
  });
  const page = browser.pages()[0];
  page.setDefaultTimeout(120000);
  const shoot = async (name) => {
    await page.waitForTimeout(4000); // plots move into place
    await page.screenshot({ path: path.join(directory, `${name}.png`) });
  };
  const json = (list) => encodeURIComponent(JSON.stringify(list));
  const ids = runs.map((run) => run.info.run_id);
  await page.goto(`${server}/#/compare-runs?runs=${json(ids)}&experiments=${json([id])}&workflowType=machine_learning`);
  for (const name of ["Close", "Toggle sidebar"]) { // MLflow's assistant; the menu
    await page.getByRole("button", { name, exact: true }).click();
  }
  await page.getByText("Scatter Plot").click();
  for (const [axis, metric] of [["x", x], ["y", y]]) {
    await page.locator(`#${axis}-axis-selector`).click();
    await page.getByRole("option", { name: metric, exact: true }).click();
  }
  await shoot("scatter");
  await page.getByText("Parallel Coordinates Plot").click();
  await page.getByText("Clear All").click();
  for (const [place, names] of [varied, [y]].entries()) {
    await page.locator("input[type=search]").nth(place).click({ force: true });
    for (const name of names) {
      await page.keyboard.type(name);
      await page.keyboard.press("Enter");
    }
    await page.keyboard.press("Escape");
  }
  await shoot("parallel");
  await browser.close();
  fs.rmSync(profile, { recursive: true });
}

main();
