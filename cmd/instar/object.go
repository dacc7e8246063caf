package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/instar-img/instar/sdk/option"
)

// objectKeys are the types of --object that qemu-img makes, and what the one
// that the command line mostly has takes. Others are checked for their id.
var objectKeys = map[string][]string{
	"secret":         {"data", "file", "format", "iv", "keyid", "loaded"},
	"secret_keyring": nil, "throttle-group": nil, "tls-cipher-suites": nil,
	"tls-creds-anon": nil, "tls-creds-psk": nil, "tls-creds-x509": nil,
	"authz-list": nil, "authz-listfile": nil, "authz-pam": nil, "authz-simple": nil,
}

// checkObjects checks the --object flags of a command, TYPE,id=ID,... each, as
// qemu-img does. Nothing uses them: they serve encryption, which is deferred.
func checkObjects(objects []string) error {
	seen := map[string]bool{}
	for _, o := range objects {
		id, err := parseObject(o)
		if err != nil {
			return err
		}
		if seen[id] {
			return fmt.Errorf("attempt to add duplicate property '%s' to object (type 'container')", id)
		}
		seen[id] = true
	}
	return nil
}

// parseObject checks one object and returns its id.
func parseObject(s string) (id string, err error) {
	var settings []option.Setting
	if s != "" {
		if settings, _, err = option.Split(s); err != nil {
			return "", err
		}
	}
	kind, given := "", map[string]string{}
	for i, x := range settings {
		switch {
		case i == 0 && x.Bare, x.Key == "qom-type":
			kind = x.Value
			if x.Bare {
				kind = x.Key
			}
		default:
			given[x.Key] = x.Value
		}
	}
	if kind == "" {
		return "", errors.New("Parameter 'qom-type' is missing")
	}
	keys, known := objectKeys[kind]
	if !known {
		return "", fmt.Errorf("Parameter 'qom-type' does not accept value '%s'", kind)
	}
	id = given["id"]
	if id == "" {
		return "", errors.New("Parameter 'id' is missing")
	}
	if kind != "secret" {
		return id, nil
	}
	for _, x := range settings {
		if x.Key != kind && x.Key != "qom-type" && x.Key != "id" && !slices.Contains(keys, x.Key) {
			return "", fmt.Errorf("Parameter '%s' is unexpected", x.Key)
		}
	}
	_, data := given["data"]
	_, file := given["file"]
	switch {
	case data && file:
		return "", errors.New("'file' and 'data' are mutually exclusive")
	case !data && !file:
		return "", errors.New("Either 'file' or 'data' must be provided")
	}
	return id, nil
}
