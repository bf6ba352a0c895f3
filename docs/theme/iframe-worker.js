// Search without a server. The theme searches in a Web Worker, and browsers start none from pages opened as files.
// There a hidden frame takes its place: the worker's script runs in it, and messages go in and out as events.
if (location.protocol === "file:") {
  const load = (page, src) =>
    new Promise((resolve, reject) => {
      const script = page.createElement("script");
      script.src = src;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`Cannot load ${src}.`));
      page.head.append(script);
    });

  // The theme's worker looks for this name to find out where it runs.
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      this.inside = this.frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inside.importScripts = async (...sources) => {
        for (const source of sources) await load(this.frame.contentDocument, source);
      };
      this.started = load(this.frame.contentDocument, new URL(url, location.href).href);
    }

    postMessage(data) {
      this.started.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
