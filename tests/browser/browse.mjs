// node browse.mjs ADDRESS FOLDER: opens browse.ipynb in JupyterLab while a run called atoms goes on; prints what was seen, as JSON.
import { openBrowser, pixels, runAll, until } from './common.mjs'

const [address, folder] = process.argv.slice(2)
const { browser, page, faults } = await openBrowser(1500, 1250)
const found = { faults }

try {
  await runAll(page, `${address}/lab/tree/browse.ipynb`)
  const runs = page.locator('.jp-OutputArea-output:has(.widget-checkbox)').first()
  await until('the table', () => runs.isVisible(), 150)
  const boxes = runs.locator('.widget-checkbox input')
  found.rows = await boxes.count()

  const line = runs.locator('.widget-html-content', { hasText: 'running' }).last()
  const before = await line.innerText()
  found.follows = await until('another epoch', async () => await line.innerText() !== before, 20)

  const curves = runs.locator('.widget-image').first()
  const shown = await until('curves', () => pixels(curves))
  found.redraws = await until('longer curves', async () => await pixels(curves) !== shown, 20)
  await page.screenshot({ path: `${folder}/browse.png` })

  await boxes.last().uncheck()
  await runs.locator('.lm-TabBar-tabLabel', { hasText: /^Where they differ$/ }).click()
  const table = () => runs.locator('table').innerText()
  found.differs = await until('the differences of the ticked runs', async () => /\bdataset\b/.test(await table()) && !/\bfirst\b/.test(await table()))
} catch (error) {
  faults.push(String(error.message))
  await page.screenshot({ path: `${folder}/browse-stopped.png` })
} finally {
  await browser.close()
}
console.log(JSON.stringify(found))
