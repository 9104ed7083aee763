() => [...document.querySelectorAll('button, input, textarea, select, a[href], [role=slider], [tabindex="0"]')]
  .filter((node) => node.checkVisibility() && node.getAttribute('aria-hidden') !== 'true' && node.type !== 'hidden')
  .filter((node) => {
    const labelled = (node.getAttribute('aria-labelledby') || '').split(' ').map((id) => document.getElementById(id));
    const words = [node.getAttribute('aria-label'), node.title, node.textContent, node.placeholder, node.alt,
      ...[...(node.labels || [])].map((label) => label.textContent), ...labelled.map((label) => label && label.textContent)];
    const inner = [...node.querySelectorAll('[aria-label], [title], img')].flatMap((one) => [one.ariaLabel, one.title, one.alt]);
    return ![...words, ...inner].some((text) => text && text.trim());
  }).map((node) => node.outerHTML.slice(0, 200))
