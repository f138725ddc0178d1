"""The result page of one run: `tables` (numbers and their wording), `figures` (charts), `page` (the HTML file).

Nothing is re-exported here, so that `tvilfm.report.tables` stays importable without matplotlib.
"""
