"""`granary report`: one HTML page about a store. `page` puts the sections together; each section has a module."""

from jobs.report.page import CONTENTS, report_page, write_report

__all__ = ["CONTENTS", "report_page", "write_report"]
