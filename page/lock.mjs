// Removes addresses from package-lock.json, after `npm run lock` has written it: packages come from
// whichever registry npm is set to, and their hashes are in the lockfile.
import { readFileSync, writeFileSync } from "node:fs";

const FILE = "package-lock.json";
const lock = JSON.parse(readFileSync(FILE, "utf-8"));
for (const entry of Object.values(lock.packages)) {
  delete entry.funding;
  if (!entry.link) delete entry.resolved;
}
writeFileSync(FILE, `${JSON.stringify(lock, null, 2)}\n`);
