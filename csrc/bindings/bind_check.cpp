#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "check/hazard_checker.h"
#include "check/published_races.h"

namespace py = pybind11;

namespace torch_offload {

namespace {

template <typename T>
std::optional<T> unless(T value, T none) {
  return value == none ? std::optional<T>() : std::optional<T>(value);
}

std::vector<Finding> check(const OpLog& log, std::size_t max_findings) {
  return HazardChecker(max_findings).check(log);
}

}  // namespace

void bind_check(py::module_& module) {
  py::class_<Finding>(module, "Finding", "Two ops of a log, and the edge missing between them.")
      .def_property_readonly("kind", [](const Finding& finding) { return name_of(finding.kind); })
      .def_property_readonly("first",
                             [](const Finding& finding) { return unless(finding.first, kNoOp); })
      .def_readonly("second", &Finding::second)
      .def_property_readonly("first_kind",
                             [](const Finding& finding) {
                               return finding.first == kNoOp
                                          ? std::optional<const char*>()
                                          : std::optional<const char*>(name_of(finding.first_kind));
                             })
      .def_property_readonly("second_kind",
                             [](const Finding& finding) { return name_of(finding.second_kind); })
      .def_property_readonly(
          "first_unit", [](const Finding& finding) { return unless(finding.first_unit, kNoUnit); })
      .def_property_readonly(
          "second_unit",
          [](const Finding& finding) { return unless(finding.second_unit, kNoUnit); })
      .def_property_readonly("memory",
                             [](const Finding& finding) {
                               return std::pair(finding.memory.begin, finding.memory.end);
                             })
      .def_readonly("message", &Finding::message);

  module.def("check", &check, py::arg("log"),
             py::arg("max_findings") = std::size_t{HazardChecker::kMaxFindings},
             py::call_guard<py::gil_scoped_release>());

  py::class_<PublishedRace>(module, "PublishedRace", "A race that shipped, and what it needed.")
      .def_property_readonly("id", [](const PublishedRace& race) { return race.id; })
      .def_property_readonly("what", [](const PublishedRace& race) { return race.what; })
      .def_property_readonly("where", [](const PublishedRace& race) { return race.where; })
      .def_property_readonly("ruled_out_by",
                             [](const PublishedRace& race) { return race.ruled_out_by; })
      .def_property_readonly("python_test", [](const PublishedRace& race) {
        return race.python_test == nullptr ? std::optional<const char*>()
                                           : std::optional<const char*>(race.python_test);
      });

  module.def("published_races", [] { return published_races(); });
  module.def(
      "run_race",
      [](const PublishedRace& race, Device& device, bool planted) {
        const RaceOutcome outcome = run_race(race, device, planted);
        return std::pair(outcome.is_caught(race), outcome.findings);
      },
      py::arg("race"), py::arg("device"), py::kw_only(), py::arg("planted"),
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace torch_offload
