// node docs.mjs ADDRESS FOLDER PAGE …: opens every page; prints what went wrong and what was seen, as JSON. Screenshots go to FOLDER.
import { openBrowser, pixels, until } from './common.mjs'

const [address, folder, ...pages] = process.argv.slice(2)
const { browser, page, faults } = await openBrowser(1400, 1000)
const found = { pages: 0, faults: [], sliders: {} }

async function turnSliders() {
  for (const turned of await page.locator('.turned').all()) {
    await turned.scrollIntoViewIfNeeded()
    const shown = turned.locator('img:visible').first()
    await until('a picture below its slider', () => shown.isVisible())
    const before = await pixels(shown)
    await turned.locator('.noUi-handle').press('ArrowRight')
    found.sliders[await turned.getAttribute('id')] = await until('another picture', async () => await pixels(turned.locator('img:visible').first()) !== before, 10)
  }
}

try {
  for (const name of pages) {
    faults.length = 0
    await page.goto(`${address}/${name}`, { waitUntil: 'load' })
    if (name === 'formulas.html') {
      await turnSliders()
      found.formulas = await page.locator('mjx-container svg').count()
    }
    if (['index.html', 'tutorial.html', 'formulas.html', 'api/formulas/formula.html', 'recipes.html'].includes(name) || /formulas\/\d\d_contours/.test(name))
      await page.screenshot({ path: `${folder}/docs-${name.replace(/.*\/|\.html$/g, '')}.png` })
    found.faults.push(...faults.map(fault => `${name}: ${fault}`))
    found.pages += 1
  }
} catch (error) {
  found.faults.push(String(error.message))
} finally {
  await browser.close()
}
console.log(JSON.stringify(found))
