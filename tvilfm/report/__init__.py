"""The result pages of runs and sweeps.

`tables` formats numbers and sentences, `charts` draws figures, and `page` and `sweep` write the HTML files. Nothing is
re-exported here, so that `tvilfm.report.tables` stays importable without matplotlib.
"""
