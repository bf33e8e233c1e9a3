// Bundles app.tsx with Grafana's components into built/.
import { copyFileSync } from 'node:fs';
import { build } from 'esbuild';

// react-custom-scrollbars-2 is CommonJS, and Grafana imports its default as if it were not.
const scrollbars = {
  name: 'scrollbars',
  setup(b) {
    b.onResolve({ filter: /^react-custom-scrollbars-2$/ }, (a) =>
      a.namespace === 'scrollbars' ? undefined : { path: 'scrollbars', namespace: 'scrollbars' },
    );
    b.onLoad({ filter: /.*/, namespace: 'scrollbars' }, () => ({
      resolveDir: process.cwd(),
      contents:
        "const m = require('./node_modules/react-custom-scrollbars-2');" +
        'export const Scrollbars = m.Scrollbars; export default m.default;',
    }));
  },
};

await build({
  entryPoints: ['app.tsx'],
  bundle: true,
  format: 'esm',
  splitting: true,
  outdir: 'built',
  minify: true,
  jsx: 'automatic',
  define: { 'process.env.NODE_ENV': '"production"', 'process.env': '{}', global: 'window' },
  loader: { '.svg': 'dataurl', '.png': 'dataurl' },
  external: ['monaco-editor', 'monaco-editor/*'],
  plugins: [scrollbars],
  logLevel: 'error',
});
copyFileSync('index.html', 'built/index.html');
