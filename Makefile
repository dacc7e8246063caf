# Run `make help` for the list of targets.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build

VERSION  ?= 0.1.0
PREFIX   ?= /usr/local
DESTDIR  ?=
FUZZTIME ?= 20s
GO       ?= go
# The commit whose .proto files the present ones must stay compatible with.
PROTO_BASE ?= HEAD~1
# Arguments of the bench harness, for instance BENCHFLAGS='-only info -runs 31'.
BENCHFLAGS ?=

# grpcnotrace leaves out golang.org/x/net/trace and with it html/template: the
# largest saving in start-up time of core and plugins.
export CGO_ENABLED := 0
export GOFLAGS     := -tags=grpcnotrace -trimpath -buildvcs=false
LDFLAGS := -s -w -X main.version=$(VERSION)

PLUGIN_DIRS := $(patsubst %/main.go,%,$(wildcard plugins/*/instar-format-*/main.go))
PLUGINS     := $(notdir $(PLUGIN_DIRS))
PROGRAMS    := $(wildcard ./cmd/instar) $(addprefix ./,$(PLUGIN_DIRS))
PLATFORMS   := linux/amd64 linux/arm64 darwin/arm64

SCRIPTS     := $(wildcard .ci/*) $(wildcard packaging/*) test/vm/run examples/python/install

# Packages whose tests drive the built programs.
INTEGRATION := ./cmd/... ./test/...

##@ Build

.PHONY: build instar
build: ## Build bin/instar, its plugins, their manifests and the link bin/qemu-img
	@mkdir -p bin
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/ $(PROGRAMS)
	@for p in $(PLUGINS); do \
		bin/$$p --manifest >bin/.$$p.json || { rm -f bin/.$$p.json; exit 1; }; \
		mv -f bin/.$$p.json bin/$$p.json; \
	done
	@ln -sfn instar bin/qemu-img
	@# instar refuses plugins that others could have replaced
	@chmod go-w bin bin/instar bin/instar-format-*

instar: build ## Same as build

.PHONY: install
install: build ## Install below PREFIX=/usr/local (DESTDIR= is honoured)
	install -d -m 755 $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/libexec/instar $(DESTDIR)$(PREFIX)/share/doc/instar
	install -m 755 bin/instar $(DESTDIR)$(PREFIX)/bin/instar
	@for p in $(PLUGINS); do \
		echo install $(DESTDIR)$(PREFIX)/libexec/instar/$$p; \
		install -m 755 bin/$$p $(DESTDIR)$(PREFIX)/libexec/instar/$$p; \
		install -m 644 bin/$$p.json $(DESTDIR)$(PREFIX)/libexec/instar/$$p.json; \
	done
	packaging/share $(CURDIR)/bin/instar $(DESTDIR)$(PREFIX)/share
	install -m 644 LICENSE $(DESTDIR)$(PREFIX)/share/doc/instar/LICENSE
	umask 022; packaging/notices $(PROGRAMS) >$(DESTDIR)$(PREFIX)/share/doc/instar/NOTICES

.PHONY: cross
cross: ## Build and vet for every supported platform, into dist/
	@for p in $(PLATFORMS); do \
		export GOOS=$${p%/*} GOARCH=$${p#*/}; \
		echo "$$p"; \
		mkdir -p dist/$$GOOS-$$GOARCH; \
		$(GO) build -ldflags '$(LDFLAGS)' -o dist/$$GOOS-$$GOARCH/ $(PROGRAMS); \
		$(GO) vet ./...; \
	done

.PHONY: packages
packages: build tools/bin/nfpm ## Build Debian packages into dist/, one for each format and one for the core
	packaging/build $(VERSION)

##@ Test

.PHONY: test test-unit test-integration oracles
test: oracles ## Install the oracles where possible, build, run every test
	@$(MAKE) --no-print-directory -k test-unit test-integration

# Other than go test it names the tests that were skipped, and why.
GOTEST = tools/bin/gotestsum --format pkgname --raw-command -- $(GO) test -json

test-unit: build tools/bin/gotestsum ## Test every package on its own
	$(GOTEST) -timeout 20m $$($(GO) list ./... | grep -v -e '/cmd/' -e '/test/')

test-integration: build tools/bin/gotestsum ## Test the built programs, against qemu-img and other readers
	$(GOTEST) -count=1 -timeout 30m $(INTEGRATION)

.PHONY: test-vm
test-vm: build ## Test under Debian's kernels, with Landlock and without, in QEMU: some minutes
	test/vm/run

.PHONY: test-packages
test-packages: packages ## Test the Debian packages in a Debian root, which needs root and debootstrap
	packaging/test $(VERSION)

oracles: ## Install what the tests compare with, or say what is missing
	@.ci/oracles

.PHONY: fuzz
fuzz: build ## Fuzz every target for FUZZTIME=20s, then a larger differential test
	.ci/fuzz $(FUZZTIME)

.PHONY: bench
bench: build ## Measure instar against qemu-img (BENCHFLAGS=-h for its flags)
	$(GO) run ./bench $(BENCHFLAGS)

##@ Check

.PHONY: lint
lint: lint-go lint-proto lint-sh ## Run all linters

.PHONY: lint-go lint-proto lint-sh
lint-go: tools/bin/golangci-lint
	tools/bin/golangci-lint run --allow-parallel-runners ./...

lint-proto: tools/bin/buf
	cd sdk/proto && ../../tools/bin/buf lint && ../../tools/bin/buf format --diff --exit-code
	@base=$$(mktemp -d); trap 'rm -rf "$$base"' EXIT; \
	if git archive '$(PROTO_BASE)' sdk/proto 2>/dev/null | tar -x -C "$$base" 2>/dev/null; then \
		echo "buf breaking against $(PROTO_BASE)"; \
		cd sdk/proto && ../../tools/bin/buf breaking --against "$$base/sdk/proto"; \
	else \
		echo "lint-proto: $(PROTO_BASE) has no sdk/proto (shallow clone?): breaking changes not checked"; \
	fi

lint-sh:
	@if command -v shellcheck >/dev/null; then \
		shellcheck $(SCRIPTS); \
	else \
		echo "lint-sh: shellcheck is not installed (Debian package shellcheck): scripts not checked"; \
	fi

.PHONY: proto
proto: tools/bin/buf tools/bin/protoc-gen-go tools/bin/protoc-gen-go-grpc ## Generate Go from sdk/proto
	cd sdk/proto && PATH="$(CURDIR)/tools/bin:$$PATH" buf generate

# The tools come from a module of their own, pinned in tools/go.mod. Building
# golangci-lint for the first time takes minutes, hence nice.
tools/bin/%: tools/go.mod
	cd tools && GOFLAGS=-trimpath nice $(GO) build -ldflags '-s -w' -o bin/ $$(sed -n 's,^\t\([^ ]*/$*\)$$,\1,p' go.mod)
	@touch $@

##@ Other

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin dist tools/bin

.PHONY: help
help: ## Print this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+( [a-z-]+)*:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
