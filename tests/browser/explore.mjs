// node explore.mjs ADDRESS FOLDER: opens explore.ipynb in JupyterLab, runs it, picks every family and moves a slider of it; prints what was seen, as JSON.
import { openBrowser, pixels, runAll, until } from './common.mjs'

// A knob of each family, and the key that moves its slider far enough to be seen.
const KNOBS = { rcdb: ['start_range', 'Home'], visualatom: ['start_range', 'Home'], fractaldb: ['points', 'Home'], ofdb2d: ['points', 'Home'], onepfrac: ['delta', 'End'],
  exfractaldb: ['points', 'Home'], mvfractaldb: ['points', 'Home'], ofdb3d: ['points', 'Home'] }

const [address, folder] = process.argv.slice(2)
const { browser, page, faults } = await openBrowser(1500, 1250)
const found = { families: {}, faults }

try {
  await runAll(page, `${address}/lab/tree/explore.ipynb`)
  const explorer = page.locator('.jp-OutputArea-output:has(.widget-image)').first()
  await until('the explorer', () => explorer.isVisible(), 150)
  const picture = explorer.locator('.widget-image').first()
  const family = explorer.locator('select', { has: page.locator('option', { hasText: /^rcdb$/ }) })
  const another = async before => until('another picture', async () => { const now = await pixels(picture); return now !== before && now })

  found.offered = await family.locator('option').allTextContents()
  for (const name of found.offered) {
    let shown = await pixels(picture)
    if (await family.inputValue() !== name) {
      await family.selectOption(name)
      shown = await another(shown)
    }
    const [knob, key] = KNOBS[name]
    const slider = explorer.locator('.widget-slider', { has: page.locator('.widget-label', { hasText: new RegExp(`^${knob}$`) }) })
    await slider.locator('.noUi-handle').press(key)
    found.families[name] = Boolean(await another(shown))
    await explorer.scrollIntoViewIfNeeded()
    await page.screenshot({ path: `${folder}/explore-${name}.png` })
  }
} catch (error) {
  faults.push(String(error.message))
  await page.screenshot({ path: `${folder}/explore-stopped.png` })
} finally {
  await browser.close()
}
console.log(JSON.stringify(found))
