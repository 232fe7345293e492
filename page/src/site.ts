// Where the site lies. What it keeps in the browser is named after its folder, as a host may have
// several sites.

/** The address of the site's folder, from the page and from its worker. */
export const BASE = new URL("./", self.location.href.replace(/assets\/[^/]*$/, "")).href;

export function scoped(name: string): string {
  return `rgexport-${name} ${new URL(BASE).pathname}`;
}
