"""The charts of the result pages, each as one self-contained inline SVG string.

Every chart is a function from arrays to SVG. It draws on its own `matplotlib.figure.Figure` and never uses pyplot with
its global figures. Sizes are CSS pixels (one SVG unit = one pixel), so a 12-unit label is a 12-pixel label on the page.
Text is kept as text and uses the page's font. A query modality has the same colour and marker in every chart.

Shape suffixes: Q query rows, G gallery rows, N rows of both, D feature.
"""
