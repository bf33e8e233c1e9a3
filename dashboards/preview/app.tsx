// One dashboard, drawn with Grafana's components from a Prometheus server. It is not Grafana: panels are drawn by
// @grafana/ui and data goes through @grafana/data, but menus, tooltips and the panel plugins themselves are not here.
import React, { useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import * as D from '@grafana/data';
import { BarGaugeValueMode } from '@grafana/schema';
import { TableNG } from '@grafana/ui/unstable';
import {
  BarGauge, BarGaugeDisplayMode, BigValue, BigValueColorMode, BigValueGraphMode, BigValueTextMode,
  GlobalStyles, PanelChrome, PortalContainer, ThemeContext, TimeSeries,
} from '@grafana/ui';

const asked = new URLSearchParams(location.search);
const prometheus = asked.get('prometheus')!;
const theme = D.createTheme({ colors: { mode: (asked.get('theme') as 'dark' | 'light') ?? 'dark' } });
const COLUMNS = 24, CELL = 30, GAP = 8;
const to = Number(asked.get('to')), range = Number(asked.get('range')), from = to - range;

(window as any).__grafana_public_path__ = './';
const transformers = new Map(Object.values(D.standardTransformers).map((t: any) => [t.id, t]));
D.standardTransformersRegistry.setInit(() =>
  [...transformers.values()].map((t: any) => ({ id: t.id, name: t.name, transformation: t, editor: () => null }) as any),
);

type Values = Record<string, string[]>;
type Mark = { at: number; color: string };

// --- what Prometheus is asked

const escaped = (text: string) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\\\$&');

// As Grafana's Prometheus data source: several values, or a variable for regular expressions, become a pattern.
function filled(text: string, values: Values, multi: Set<string>, step: number) {
  const own: Record<string, string> = {
    __rate_interval: `${Math.max(20, step + 5)}s`, __interval: `${step}s`, __range: `${range}s`,
  };
  return text.replace(/\$\{(\w+)(?::\w+)?\}|\$(\w+)/g, (found, a, b) => {
    const name = a ?? b;
    if (own[name]) return own[name];
    const chosen = values[name];
    if (!chosen) return found;
    if (chosen.length === 1) return chosen[0] === '.*' || !multi.has(name) ? chosen[0] : escaped(chosen[0]);
    return `(${chosen.map(escaped).join('|')})`;
  });
}

async function ask(path: string, query: Record<string, string>) {
  const answer = await (await fetch(`${prometheus}/api/v1/${path}?${new URLSearchParams(query)}`)).json();
  if (answer.status !== 'success') throw new Error(answer.error);
  return answer.data;
}

const legend = (target: any, labels: Record<string, string>) =>
  target.legendFormat
    ? target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_: string, key: string) => labels[key] ?? '')
    : Object.entries(labels).map(([k, v]) => `${k}=${v}`).join(' ') || 'Value';

async function tableOf(target: any, several: boolean, query: string): Promise<D.DataFrame> {
  const { result } = await ask('query', { query, time: String(to) });
  const keys = [...new Set<string>(result.flatMap((s: any) => Object.keys(s.metric)))].sort();
  const time = { name: 'Time', type: D.FieldType.time, values: result.map((s: any) => s.value[0] * 1e3) };
  const labels = keys.map((key) => ({
    name: key, type: D.FieldType.string, values: result.map((s: any) => s.metric[key] ?? ''),
  }));
  const name = several ? `Value #${target.refId}` : 'Value';
  const value = { name, type: D.FieldType.number, values: result.map((s: any) => Number(s.value[1])) };
  return D.createDataFrame({ refId: target.refId, fields: result.length ? [time, ...labels, value] : [] });
}

async function seriesOf(target: any, query: string, step: number): Promise<D.DataFrame[]> {
  const start = target.instant ? to : Math.floor(from / step) * step;
  const { result } = await ask('query_range', {
    query, start: String(start), end: String(to), step: String(step), // one point if instant
  });
  return result.map((s: any) => {
    const known = new Map<number, number>(s.values.map(([t, v]: any) => [Math.round(t), Number(v)]));
    const times: number[] = [], values: (number | null)[] = [];
    for (let t = start; t <= to; t += step) {
      times.push(t * 1e3);
      values.push(known.get(t) ?? null);
    }
    return D.createDataFrame({
      refId: target.refId,
      fields: [
        { name: 'Time', type: D.FieldType.time, config: { interval: step * 1e3 }, values: times },
        {
          name: 'Value', type: D.FieldType.number, labels: s.metric, values,
          config: { displayNameFromDS: legend(target, s.metric) },
        },
      ],
    });
  });
}

async function framesOf(panel: any, values: Values, multi: Set<string>, step: number): Promise<D.DataFrame[]> {
  const targets = panel.targets ?? [];
  const parts = targets.map((target: any) => {
    const query = filled(target.expr, values, multi, step);
    return target.format === 'table'
      ? tableOf(target, targets.length > 1, query).then((frame) => [frame])
      : seriesOf(target, query, step);
  });
  const frames = (await Promise.all(parts)).flat().filter((frame) => frame.fields.length);
  return new Promise((done) => D.transformDataFrame(panel.transformations ?? [], frames).subscribe(done));
}

// --- how fields look

function dressed(frames: D.DataFrame[], panel: any): D.DataFrame[] {
  const lines = panel.type === 'timeseries';
  const base = {
    drawStyle: 'line', lineInterpolation: 'linear', showPoints: 'auto', axisPlacement: 'auto', axisColorMode: 'text',
    axisBorderShow: false, scaleDistribution: { type: 'linear' }, spanNulls: false,
  };
  const { defaults = {}, overrides = [] } = panel.fieldConfig ?? {};
  // A dashboard's JSON has null where Grafana works with -Infinity.
  const steps = (found: any) =>
    found && { ...found, steps: found.steps.map((s: any) => ({ ...s, value: s.value ?? -Infinity })) };
  let number = 0;
  for (const frame of frames) for (const field of frame.fields) {
    const name = D.getFieldDisplayName(field, frame, frames);
    const mine = overrides.filter((o: any) => o.matcher.options === name).flatMap((o: any) => o.properties);
    const config: any = {
      color: { mode: lines ? 'palette-classic' : 'thresholds' }, ...(field.type === D.FieldType.number ? defaults : {}),
      ...field.config, custom: { ...(lines ? base : {}), ...defaults.custom },
    };
    for (const { id, value } of mine) {
      if (id.startsWith('custom.')) config.custom[id.slice(7)] = value;
      else config[id] = value;
    }
    field.config = { ...config, thresholds: steps(config.thresholds) };
    if (field.type === D.FieldType.number) field.state = { ...field.state, seriesIndex: number++ };
    field.display = D.getDisplayProcessor({ field, theme, timeZone: 'utc' });
    field.getLinks = () => [];
    field.state = { ...field.state, displayName: D.getFieldDisplayName(field, frame, frames) };
  }
  return frames;
}

function newest(field: D.Field) {
  for (let i = field.values.length - 1; i >= 0; i--) if (field.values[i] !== null) return field.values[i];
  return null;
}

const numbers = (frames: D.DataFrame[]) =>
  frames.flatMap((frame) => frame.fields.filter((field) => field.type === D.FieldType.number));

function withMarks(marks: Mark[]) {
  return (config: any) => {
    config.addHook('draw', (plot: any) => {
      const { ctx, bbox } = plot;
      ctx.save();
      ctx.setLineDash([4, 4]);
      for (const mark of marks) {
        const x = plot.valToPos(mark.at, 'x', true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.strokeStyle = ctx.fillStyle = theme.visualization.getColorByName(mark.color);
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        ctx.beginPath();
        ctx.arc(x, bbox.top + bbox.height, 4, 0, 7);
        ctx.fill();
      }
      ctx.restore();
    });
    return null;
  };
}

// --- panels

function Inside({ panel, frames, marks, width, height }: any) {
  const fields = numbers(frames);
  if (panel.type === 'timeseries') {
    const timeRange: any = { from: D.dateTime(from * 1e3), to: D.dateTime(to * 1e3), raw: { from: '', to: '' } };
    return (
      <TimeSeries
        frames={frames} structureRev={1} timeRange={timeRange} timeZone="utc" width={width} height={height}
        legend={panel.options.legend} options={panel.options}
      >
        {withMarks(marks)}
      </TimeSeries>
    );
  }
  if (panel.type === 'stat') {
    const shown = panel.options.textMode === 'value_and_name' ? BigValueTextMode.ValueAndName : BigValueTextMode.Value;
    return (
      <div style={{ display: 'flex' }}>
        {fields.map((field, i) => (
          <BigValue
            key={i} theme={theme} width={width / fields.length} height={height} textMode={shown} text={panel.options.text}
            value={{ ...field.display!(newest(field)), title: field.state!.displayName! }}
            colorMode={panel.options.colorMode as BigValueColorMode} graphMode={BigValueGraphMode.None}
          />
        ))}
      </div>
    );
  }
  if (panel.type === 'bargauge') {
    const each = Math.min(60, height / fields.length);
    return (
      <div>
        {fields.map((field, i) => {
          const all = fields.map(newest).filter((v) => v !== null);
          const top = field.config.max ?? Math.max(...all, (field.config.min ?? 0) + 1e-9);
          const config = { ...field.config, max: top };
          const value = { ...field.display!(newest(field)), title: field.state!.displayName! };
          return (
            <BarGauge
              key={i} theme={theme} width={width} height={each - 4} value={value} field={config}
              display={field.display} orientation={D.VizOrientation.Horizontal}
              displayMode={BarGaugeDisplayMode.Basic} valueDisplayMode={BarGaugeValueMode.Color}
              namePlacement={panel.options.namePlacement} text={panel.options.text}
            />
          );
        })}
      </div>
    );
  }
  const order = panel.options.sortBy?.[0];
  return (
    <TableNG
      data={frames[0]} width={width} height={height} structureRev={1} fieldConfig={panel.fieldConfig}
      initialSortBy={order ? [{ displayName: order.displayName, desc: order.desc }] : undefined}
      getActions={() => []} replaceVariables={(text: string) => text}
    />
  );
}

function Panel({ panel, values, multi, marks, width, height }: any) {
  const [state, setState] = useState<{ frames?: D.DataFrame[]; error?: string }>({});
  const step = Math.max(5, Math.round(range / 300));
  useEffect(() => {
    framesOf(panel, values, multi, step)
      .then((frames) => setState({ frames: dressed(frames, panel) }))
      .catch((error) => setState({ error: String(error.message ?? error) }));
  }, []);
  const title = filled(panel.title ?? '', values, new Set(), step);
  const say = (kind: string, text: string) => (
    <div data-state={kind} data-panel={title} style={{ color: kind === 'error' ? 'red' : undefined }}>{text}</div>
  );
  return (
    <PanelChrome width={width} height={height} title={title} padding="md" description={panel.description}>
      {(w: number, h: number) => {
        if (state.error) return say('error', state.error);
        if (!state.frames) return <div data-loading />;
        const none = panel.fieldConfig?.defaults?.noValue;
        if (!state.frames.some((frame) => frame.length)) return say(none ? 'drawn' : 'empty', none ?? 'No data');
        return (
          <div data-state="drawn" data-panel={title}>
            <Inside panel={panel} frames={state.frames} marks={marks} width={w} height={h} />
          </div>
        );
      }}
    </PanelChrome>
  );
}

// --- the page

async function chosen(dashboard: any): Promise<{ values: Values; all: Values; multi: Set<string> }> {
  const values: Values = {}, all: Values = {}, multi = new Set<string>();
  for (const variable of dashboard.templating.list) {
    const fixed = asked.getAll(`var-${variable.name}`);
    if (variable.multi) multi.add(variable.name);
    if (variable.type === 'custom') all[variable.name] = values[variable.name] = [variable.current.value];
    if (variable.type === 'query') {
      const [, selector, label] = /^label_values\((.+),\s*(\w+)\)$/.exec(variable.query.query)!;
      const match = filled(selector, values, multi, 15);
      const found = await ask(`label/${label}/values`, { 'match[]': match, start: String(from), end: String(to) });
      all[variable.name] = found;
      values[variable.name] = [variable.allValue ?? '.*'];
    }
    if (fixed.length) all[variable.name] = values[variable.name] = fixed;
  }
  return { values, all, multi };
}

async function marksOf(dashboard: any, values: Values, multi: Set<string>): Promise<Mark[]> {
  const marks: Mark[] = [];
  for (const annotation of dashboard.annotations?.list ?? []) {
    if (!annotation.expr || !annotation.enable) continue;
    const query = filled(annotation.expr, values, multi, 5);
    const step = Math.max(5, Math.ceil(range / 5000));
    const { result } = await ask('query_range', { query, start: String(from), end: String(to), step: String(step) });
    for (const series of result) {
      const times = series.values.map(([t, v]: any) => (annotation.useValueForTime ? Number(v) : t * 1e3));
      for (const at of new Set<number>(times)) marks.push({ at, color: annotation.iconColor });
    }
  }
  return marks;
}

function placed(dashboard: any, values: Values, all: Values) {
  const found: any[] = [];
  let shift = 0;
  const put = (panel: any, x: number, y: number, w: number, own = values) =>
    found.push({ panel, values: own, x, y, w, h: panel.gridPos.h });
  const add = (panel: any) => {
    const { x, y, w, h } = panel.gridPos;
    const each = panel.repeat ? all[panel.repeat] : undefined;
    if (!each?.length) {
      put(panel, x, y + shift, w);
      return;
    }
    const perRow = Math.min(panel.maxPerRow ?? 4, each.length);
    each.forEach((value, i) => {
      const width = COLUMNS / perRow;
      put(panel, (i % perRow) * width, y + shift + Math.floor(i / perRow) * h, width,
        { ...values, [panel.repeat]: [value] });
    });
    shift += (Math.ceil(each.length / perRow) - 1) * h;
  };
  for (const panel of dashboard.panels) {
    add(panel);
    for (const inside of panel.panels ?? []) add(inside);
    if (panel.panels?.length) shift += Math.max(...panel.panels.map((p: any) => p.gridPos.y + p.gridPos.h)) - panel.gridPos.y - 1;
  }
  return found;
}

function Page({ dashboard, values, all, multi, marks }: any) {
  const width = innerWidth - 2 * GAP, cell = (width + GAP) / COLUMNS;
  const items = placed(dashboard, values, all);
  const height = Math.max(...items.map((item) => item.y + item.h)) * (CELL + GAP) + 64;
  const style: React.CSSProperties = { position: 'relative', height, color: theme.colors.text.primary };
  const said = Object.entries(values as Values).map(([k, v]) => `${k}: ${v.join(', ') === '.*' ? 'all' : v.join(', ')}`);
  return (
    <div style={style} data-ready>
      <div style={{ padding: '10px 12px', display: 'flex', gap: 24, alignItems: 'baseline' }}>
        <span style={{ fontSize: 18, fontWeight: 500 }}>{dashboard.title}</span>
        <span style={{ color: theme.colors.text.secondary }}>{said.join(' · ')}</span>
        <span style={{ color: theme.colors.text.disabled, marginLeft: 'auto' }}>
          drawn with Grafana UI components, not by Grafana
        </span>
      </div>
      {items.map((item, i) => {
        const left = GAP + item.x * cell, top = 44 + item.y * (CELL + GAP);
        return (
          <div key={i} style={{ position: 'absolute', left, top }}>
            {item.panel.type === 'row' ? (
              <h4 style={{ margin: '8px 4px', fontSize: 16 }}>{item.panel.title}</h4>
            ) : (
              <Panel {...item} multi={multi} marks={marks} width={item.w * cell - GAP} height={item.h * (CELL + GAP) - GAP} />
            )}
          </div>
        );
      })}
    </div>
  );
}

async function main() {
  const dashboard = await (await fetch('dashboard.json')).json();
  document.body.style.background = theme.colors.background.canvas;
  const { values, all, multi } = await chosen(dashboard);
  const marks = await marksOf(dashboard, values, multi);
  createRoot(document.getElementById('root')!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <Page dashboard={dashboard} values={values} all={all} multi={multi} marks={marks} />
      <PortalContainer />
    </ThemeContext.Provider>,
  );
}

main().catch((error) => {
  const box = document.getElementById('root')!;
  box.textContent = String(error.message ?? error);
  box.dataset.failed = box.dataset.state = 'error';
});
