// A page in Chromium that reaches this machine only, and a list of all that goes wrong in it.
import { chromium } from 'playwright-core'

export async function openBrowser(width, height) {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox', '--disable-gpu'] })
  const context = await browser.newContext({ viewport: { width, height } })
  const page = await context.newPage()
  const faults = []
  await context.route(url => !['localhost', '127.0.0.1'].includes(url.hostname) && url.protocol.startsWith('http'), route => {
    faults.push(`asks the network for ${route.request().url()}`)
    return route.abort()
  })
  page.on('pageerror', error => faults.push(`page error: ${error.message}`))
  page.on('console', message => message.type() === 'error' && faults.push(`console: ${message.text()}`))
  page.on('response', response => response.status() >= 400 && faults.push(`${response.status()}: ${response.url()}`))
  return { browser, page, faults }
}

// What an <img> shows, as text to compare.
export const pixels = image => image.evaluate(async element => {
  await element.decode()
  const canvas = Object.assign(document.createElement('canvas'), { width: element.naturalWidth, height: element.naturalHeight })
  canvas.getContext('2d').drawImage(element, 0, 0)
  return canvas.toDataURL()
})

export async function until(what, look, seconds = 60) {
  const end = Date.now() + 1000 * seconds
  for (;;) {
    const found = await look().catch(() => null)
    if (found) return found
    if (Date.now() > end) throw new Error(`after ${seconds} s still waiting for ${what}`)
    await new Promise(resolve => setTimeout(resolve, 50))
  }
}

// Opens a notebook in JupyterLab and chooses Run › Run All Cells.
export async function runAll(page, address) {
  await page.goto(address, { waitUntil: 'load' })
  await until('the notebook', () => page.locator('.jp-Notebook .jp-CodeCell').first().isVisible())
  await until('a kernel', () => page.locator('#jp-main-statusbar', { hasText: '| Idle' }).isVisible())
  await page.locator('.lm-MenuBar-itemLabel', { hasText: /^Run$/ }).click()
  await page.locator('.lm-Menu-itemLabel', { hasText: /^Run All Cells$/ }).click()
}
